"""Comparing experts before they are merged, and the figures that all commands share."""

from moerge.comparison.flow import Comparison, compare

__all__ = ["Comparison", "compare"]
