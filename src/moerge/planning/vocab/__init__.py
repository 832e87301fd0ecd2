"""Vocabularies of the models: match tokens, check sizes, align rows."""
