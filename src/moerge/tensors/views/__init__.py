"""Tensors that are computed from other tensors when they are read."""
