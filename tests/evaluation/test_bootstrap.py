"""Errors against slow loops, known values and what must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.evaluation.bootstrap import Estimate, accuracy, bootstrap


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def test_is_the_spread_over_documents_drawn_with_replacement() -> None:
    rng = np.random.default_rng(3)
    values = np.stack([rng.gamma(2, size=40), rng.integers(1, 9, size=40)], axis=1)
    found = bootstrap(ratio, values, seed=0, resamples=4000)
    other = np.random.default_rng(99)
    drawn = []
    for _ in range(4000):
        chosen = [values[index] for index in other.integers(40, size=40)]
        drawn.append(sum(a for a, _ in chosen) / sum(b for _, b in chosen))
    assert found.value == pytest.approx(values[:, 0].sum() / values[:, 1].sum(), rel=1e-12)
    assert found.standard_error == pytest.approx(np.std(drawn), rel=0.05)
    assert [found.low, found.high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), rel=0.02)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random((7, 2))
    whole = bootstrap(ratio, values, seed=5, resamples=100)
    monkeypatch.setattr("moerge.evaluation.bootstrap._COUNTS", 50)
    assert bootstrap(ratio, values, seed=5, resamples=100) == whole
    assert bootstrap(ratio, values, seed=6, resamples=100) != whole


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.floats(0.1, 3))
def test_equal_shifts_have_no_error(values: list[float], shift: float) -> None:
    pairs = np.array([[value + shift, 1.0, value, 1.0] for value in values])
    found = bootstrap(lambda s: s[..., 0] / s[..., 1] - s[..., 2] / s[..., 3], pairs, seed=0, resamples=50)
    assert found.value == pytest.approx(shift)
    assert found.standard_error == pytest.approx(0, abs=1e-12)


def test_a_single_document_has_no_error() -> None:
    assert bootstrap(ratio, np.array([[3.0, 2.0]]), seed=0) == Estimate(1.5)
    assert accuracy([True]) == Estimate(1.0)


def test_accuracy() -> None:
    found = accuracy([True] * 3 + [False] * 7)
    assert found.value == 0.3
    assert found.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert (found.low, found.high) == (
        pytest.approx(0.10779, abs=1e-5),
        pytest.approx(0.60322, abs=1e-5),
    )  # Wilson, by R's prop.test
    none = accuracy([False] * 10)
    assert (none.value, none.standard_error, none.low) == (0, 0, 0)
    assert none.high == pytest.approx(0.27753, abs=1e-5)
