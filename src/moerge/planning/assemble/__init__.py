"""Assemblers: turn a recipe and its models into the outputs of a plan, one kind of merge per file."""
