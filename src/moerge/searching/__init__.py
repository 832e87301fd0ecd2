"""Searching the best merge: parameters of a recipe, tried on a merge in memory."""
