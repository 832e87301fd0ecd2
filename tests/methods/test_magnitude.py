from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moerge.methods.magnitude import kept_count, magnitude_thresholds
from moerge.methods.method import Statistic
from tests.helpers import reference, strategies


def thresholds(tau_EN: np.ndarray, density: float, cuts: list[int]) -> np.ndarray:
    """The measurement driven as the executor does, over blocks that end at `cuts`."""
    bounds = [0, *sorted(cuts), tau_EN.shape[1]]
    experts, size = tau_EN.shape
    steps = magnitude_thresholds([kept_count(density, size)] * experts, size)
    total = None
    while True:
        try:
            statistic: Statistic = steps.send(total)
        except StopIteration as finished:
            return finished.value
        total = statistic.zeros()
        for start, stop in pairwise(bounds):
            share = statistic.zeros()
            statistic.add(np.ascontiguousarray(tau_EN[:, start:stop]), share)
            total += share


@given(strategies.densities(), st.integers(1, 10**12))
@example(0.8, 10)
@example(0.1, 30)
@example(0.07, 100)
@example(1e-06, 1)
def test_kept_count_takes_the_density_as_the_decimal_that_was_written(density: float, size: int) -> None:
    kept = kept_count(density, size)
    assert kept == reference.kept_count(density, size)
    assert Fraction(Decimal(str(density))) * size <= kept < Fraction(Decimal(str(density))) * size + 1


@pytest.mark.parametrize(
    ("density", "size", "kept"), [(0.8, 10, 8), (0.2, 1704, 341), (0.07, 100, 7), (1.0, 7, 7), (0.001, 7, 1)]
)
def test_kept_count_of_known_cases(density: float, size: int, kept: int) -> None:
    assert kept_count(density, size) == kept


def test_binary_rounding_never_keeps_one_more() -> None:
    for hundredths in range(1, 101):
        for size in (10, 100, 1000, 32768, 22016 * 4096):
            assert kept_count(hundredths / 100, size) == -(-hundredths * size // 100)
    assert math.ceil(0.07 * 100) == 8


@given(st.data(), strategies.stacks(max_size=70), strategies.densities())
def test_the_threshold_is_the_kept_counts_largest_magnitude(data: st.DataObject, tau_EN: np.ndarray, density: float) -> None:
    cuts = data.draw(st.lists(st.integers(0, tau_EN.shape[1]), max_size=3))
    measured_E = thresholds(tau_EN, density, cuts)
    assert measured_E.dtype == np.float32
    keeps_all = reference.kept_count(density, tau_EN.shape[1]) == tau_EN.shape[1]
    expected = [0.0 if keeps_all else reference.threshold(tau_N, density) for tau_N in tau_EN]
    assert measured_E.tolist() == expected


@given(st.data(), st.integers(1, 300), st.sampled_from([0.1, 0.5, 0.9]))
def test_thresholds_inside_one_crowded_bin_are_exact(data: st.DataObject, size: int, density: float) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    lows_N = np.random.default_rng(seed).integers(0, 1 << 16, size, dtype=np.uint32)
    tau_N = (np.uint32(0x3F800000) | lows_N).view(np.float32)
    assert thresholds(tau_N[None], density, [size // 3])[0] == np.float32(reference.threshold(tau_N, density)) or (
        reference.kept_count(density, size) == size
    )


def test_any_magnitude_is_found_exactly() -> None:
    bits = np.unique(np.random.default_rng(0).integers(0, 0x7F800000, 4001, dtype=np.uint32))
    tau_N = np.random.default_rng(1).permutation(bits.view(np.float32)) * np.where(np.arange(bits.size) % 2, 1, -1).astype(
        np.float32
    )
    for rank in (1, 2, 17, 2000, bits.size - 1):
        assert thresholds(tau_N[None], (rank - 0.5) / bits.size, [1000, 1001])[0].view(np.uint32) == bits[-rank]
