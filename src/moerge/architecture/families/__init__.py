"""Tables of the supported families, one file per line of models."""
