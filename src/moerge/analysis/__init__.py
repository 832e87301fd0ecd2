"""Comparing experts before they are merged, and the figures that all commands share."""

from moerge.analysis.comparison import Comparison, compare

__all__ = ["Comparison", "compare"]
