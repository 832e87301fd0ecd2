"""Gathering of statistics over text for the merge methods that weigh experts by them."""
