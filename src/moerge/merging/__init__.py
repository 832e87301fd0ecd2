"""Merges from recipe to checkpoint: the pipeline, its manifest and model card."""
