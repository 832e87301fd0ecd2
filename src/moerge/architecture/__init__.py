"""Families of architectures as data: which tensor plays which role, and what a config means."""

from moerge.architecture.family import Expected, Family, TensorRule, expected_tensors
from moerge.architecture.registry import family_of, known_families, moe_format, moe_formats

__all__ = ["Expected", "Family", "TensorRule", "expected_tensors", "family_of", "known_families", "moe_format", "moe_formats"]
