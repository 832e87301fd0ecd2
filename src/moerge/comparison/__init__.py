"""Comparing experts before they are merged, and the figures that all commands share."""

from moerge.comparison.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
