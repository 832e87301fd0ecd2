"""Merging a single flat tensor through the public function, and comparing to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

import moerge


def merge_tensor(
    method: str, base_N: np.ndarray | None, theta_EN: np.ndarray, *, tensor: str = "w", threads: int = 1, **parameters: Any
) -> np.ndarray:
    base = None if base_N is None else {tensor: base_N}
    experts = [{tensor: theta_N} for theta_N in theta_EN]
    return moerge.merge_state_dicts(base, experts, method=method, threads=threads, **parameters)[tensor]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)
    assert actual.tobytes() == expected.tobytes(), "equal numbers, but zeros of different signs"


def assert_same_models(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_same_bits(actual[name], expected[name])


def as_float64(model: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float64) for name, array in model.items()}
