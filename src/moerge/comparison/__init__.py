"""Comparing experts before they are merged, and the figures that all commands share."""

from moerge.comparison.flow import compare
from moerge.comparison.result import Comparison, write_comparison

__all__ = ["Comparison", "compare", "write_comparison"]
