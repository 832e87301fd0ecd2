"""The sections of a report, in order. Each turns what was found into blocks, or into None where nothing was found for it."""
