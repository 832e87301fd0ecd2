"""Projectors between the hidden spaces of experts of different architectures."""
