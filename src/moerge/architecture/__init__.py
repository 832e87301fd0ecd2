"""Families of architectures as data: which tensor plays which role, and what a config means."""

from moerge.architecture.family import ExpectedTensor, Family, TensorRule, expected_tensors
from moerge.architecture.moe_format import MoEFormat, native_config
from moerge.architecture.registry import family_of, known_families, moe_format, moe_formats

__all__ = [
    "ExpectedTensor",
    "Family",
    "MoEFormat",
    "TensorRule",
    "expected_tensors",
    "family_of",
    "known_families",
    "moe_format",
    "moe_formats",
    "native_config",
]
