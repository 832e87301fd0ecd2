"""Thresholds of large tensors come from a sample and one pass; they are exact even where the sample misleads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import moerge
from moerge.methods import magnitude
from moerge.methods.magnitude import kept_count

SIZE = (1 << 20) + 70_001
RANDOM = np.random.default_rng(5)


def normal() -> np.ndarray:
    return RANDOM.standard_normal(SIZE, np.float32)


def rounded() -> np.ndarray:
    return (normal().view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def mostly_zero() -> np.ndarray:
    return np.where(RANDOM.random(SIZE) < 0.795, np.float32(0), normal())


def few_values() -> np.ndarray:
    return RANDOM.choice(np.array([-2, -1, 0, 1, 2], np.float32), SIZE)


def misleading() -> np.ndarray:
    """Large wherever the evenly spaced runs of the sample look, small elsewhere."""
    tau = normal() * np.float32(1e-3)
    for run in range(magnitude._RUNS):
        place = (2 * run + 1) * SIZE // (2 * magnitude._RUNS)
        tau[place : place + (1 << 14)] *= np.float32(1e6)
    return tau


@pytest.fixture
def histograms(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the exact two-pass search had to be used."""
    used: list[int] = []
    search = magnitude._from_histograms

    def spy(kept: int, experts: int) -> object:
        used.append(kept)
        return search(kept, experts)

    monkeypatch.setattr(magnitude, "_from_histograms", spy)
    return used


@pytest.mark.parametrize("density", [0.8, 0.2, 0.005, 1e-6, 0.999999])
@pytest.mark.parametrize(
    ("make", "falls_back"),
    [(normal, False), (rounded, False), (mostly_zero, None), (few_values, False), (misleading, True)],
)
def test_the_threshold_is_exact(
    make: Callable[[], np.ndarray], falls_back: bool | None, density: float, histograms: list[int]
) -> None:
    tau = make()
    base = np.zeros_like(tau)
    threshold = np.sort(np.abs(tau))[-kept_count(density, SIZE)]
    expected = np.where(np.abs(tau) >= threshold, tau, np.float32(0))
    merged = moerge.merge_state_dicts({"w": base}, [{"w": tau}], method="ties", density=density, scale=1.0)["w"]
    np.testing.assert_array_equal(merged, expected)
    if falls_back is not None and density in (0.8, 0.2):
        assert bool(histograms) == falls_back


def test_experts_have_brackets_of_their_own() -> None:
    taus = [normal() * np.float32(scale) for scale in (1e-3, 1, 50)]
    base = normal()
    thresholds = [np.sort(np.abs((base + tau) - base))[-kept_count(0.3, SIZE)] for tau in taus]
    merged = moerge.merge_state_dicts(
        {"w": base}, [{"w": base + tau} for tau in taus], method="ties", density=0.3, scale=1.0, threads=3
    )["w"]
    exact = [(base + tau) - base for tau in taus]
    trimmed = [np.where(np.abs(tau) >= limit, tau, np.float32(0)) for tau, limit in zip(exact, thresholds, strict=True)]
    elected = (trimmed[0] + trimmed[1]) + trimmed[2] >= 0
    agreeing = [np.where((tau >= 0) == elected, tau, np.float32(0)) for tau in trimmed]
    np.testing.assert_array_equal(merged, base + ((agreeing[0] + agreeing[1]) + agreeing[2]))
