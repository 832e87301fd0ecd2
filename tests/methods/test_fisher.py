"""Fisher merging of what is given: the formula, its limits, floors and norms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from tests.helpers import strategies
from tests.methods.one_tensor import assert_same_bits


def fisher(theta_EN: Any, fisher_EN: Any, **options: Any) -> np.ndarray:
    experts = [{"w": np.array(theta_N, np.float32)} for theta_N in theta_EN]
    statistics = [{"w": np.array(fisher_N, np.float32)} for fisher_N in fisher_EN]
    return moerge.merge_state_dicts(None, experts, method="fisher", statistics=statistics, threads=1, **options)["w"]


def drawn(seed: int, experts: int = 3, size: int = 10_000) -> tuple[np.ndarray, np.ndarray]:
    """Values, and Fisher information over many orders of magnitude, as real ones are."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((experts, size)).astype(np.float32), np.exp(rng.normal(-25, 5, (experts, size))).astype(np.float32)


@given(st.integers(0, 1000), st.integers(1, 4), st.sampled_from([1, 2, 4095, 4096, 4097, 200_000]))
def test_it_is_the_formula(seed: int, experts: int, size: int) -> None:
    theta_EN, fisher_EN = drawn(seed, experts, size)
    weights = np.random.default_rng(seed).uniform(0.1, 2, experts).astype(np.float32)
    masses_EN = weights[:, None].astype(np.float64) * fisher_EN
    expected_N = (masses_EN * theta_EN).sum(axis=0) / masses_EN.sum(axis=0)
    merged_N = fisher(theta_EN, fisher_EN, weights=weights, floor=0)
    np.testing.assert_allclose(merged_N, expected_N, rtol=1e-6, atol=1e-6)


@given(strategies.stacks())
def test_equal_information_gives_the_average(stack: np.ndarray) -> None:
    alike = np.full_like(stack, 3e-9)
    expected_N = stack.astype(np.float64).mean(axis=0)
    tolerance = 1e-6 * float(np.abs(stack).max()) + 2**-149
    np.testing.assert_allclose(fisher(stack, alike), expected_N, rtol=0, atol=tolerance)


@given(strategies.stacks(rows=1))
def test_a_single_expert_stays_what_it_is(stack: np.ndarray) -> None:
    np.testing.assert_array_equal(fisher(stack, np.full_like(stack, 1e-12)), stack[0])


def test_a_factor_on_all_information_changes_nothing() -> None:
    theta_EN, fisher_EN = drawn(1)
    np.testing.assert_allclose(fisher(theta_EN, fisher_EN), fisher(theta_EN, 64 * fisher_EN), rtol=1e-6)


def test_what_one_expert_alone_needs_is_its_own() -> None:
    assert fisher([[1.0], [5.0]], [[0.0], [2.0]], floor=0).tolist() == [5.0]


def test_what_nobody_needs_is_averaged_by_weight() -> None:
    theta_EN, fisher_EN = [[1.0, 1.0], [5.0, 5.0]], [[0.0, 1.0], [0.0, 1.0]]
    assert fisher(theta_EN, fisher_EN, floor=0).tolist() == [3.0, 3.0]
    assert fisher(theta_EN, fisher_EN, floor=0, weights=[3, 1]).tolist() == [2.0, 2.0]
    assert fisher(theta_EN, fisher_EN).tolist() == [3.0, 3.0]  # both at the floor


def test_the_floor_is_a_share_of_each_experts_mean() -> None:
    """The first expert's mean is 2, so that its 0 counts as 0.5 at a floor of a quarter; the second's is 8."""
    merged_N = fisher([[0.0, 0.0], [1.0, 1.0]], [[0.0, 4.0], [8.0, 8.0]], floor=0.25)
    np.testing.assert_allclose(merged_N, [8 / 8.5, 8 / 12], rtol=1e-6)


def test_the_mean_of_the_floor_spans_the_model() -> None:
    experts = [
        {"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)},
        {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)},
    ]
    information = [{"a": np.zeros(2), "b": np.full(2, 4.0)}, {"a": np.ones(2), "b": np.ones(2)}]
    merged = moerge.merge_state_dicts(None, experts, method="fisher", statistics=information, floor=0.5)
    np.testing.assert_allclose(merged["a"], 0.5)  # 0.5 * 2 against 1
    np.testing.assert_allclose(merged["b"], 0.2)


@pytest.mark.parametrize(("normalize", "expected"), [("none", [0.5, 0.9]), ("tensor", [0.5, 0.5]), ("model", [0.2, 0.68])])
def test_norms(normalize: str, expected: list[float]) -> None:
    """The second expert's information is 1 and 9 times the first's; over both tensors, of one entry each, its norm is 4 times."""
    first, second = {"a": np.array([3.0]), "b": np.array([1.0])}, {"a": np.array([3.0]), "b": np.array([9.0])}
    scale = np.hypot(3, 9) / np.hypot(3, 1)
    experts = [{n: np.zeros(1, np.float32) for n in "ab"}, {n: np.ones(1, np.float32) for n in "ab"}]
    merged = moerge.merge_state_dicts(None, experts, method="fisher", statistics=[first, second], normalize=normalize, floor=0)
    if normalize == "model":
        expected = [1 / (1 + scale), 9 / (9 + scale)]
    np.testing.assert_allclose([merged["a"][0], merged["b"][0]], expected, rtol=1e-6)


def test_an_expert_without_information_of_a_tensor_counts_little_whatever_the_norm() -> None:
    experts = [{n: np.zeros(1, np.float32) for n in "ab"}, {n: np.ones(1, np.float32) for n in "ab"}]
    information = [{"a": np.zeros(1), "b": np.ones(1)}, {"a": np.ones(1), "b": np.ones(1)}]
    merged = moerge.merge_state_dicts(None, experts, method="fisher", statistics=information, normalize="tensor")
    assert 0.999 < merged["a"][0] <= 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_blocks_do_not_matter(threads: int) -> None:
    theta_EN, fisher_EN = drawn(3, size=1 << 18)
    experts = [{"w": theta_N} for theta_N in theta_EN]
    statistics = [{"w": fisher_N} for fisher_N in fisher_EN]
    merged = moerge.merge_state_dicts(None, experts, method="fisher", statistics=statistics, threads=threads)["w"]
    assert_same_bits(merged[:100], fisher(theta_EN, fisher_EN)[:100])
    assert_same_bits(merged, fisher(theta_EN, fisher_EN))


def test_refusals() -> None:
    state = {"w": np.ones(2, np.float32)}

    def fails(message: str, **options: Any) -> None:
        with pytest.raises(InputError) as caught:
            moerge.merge_state_dicts(None, [state, state], **{"method": "fisher", **options})
        assert str(caught.value) == message

    fails("fisher needs 'statistics': one dict for each of 2 experts")
    fails("fisher needs 'statistics': one dict for each of 2 experts", statistics=[state])
    fails("expert1 has no statistic for tensor 'w', but other experts have one", statistics=[state, {}])
    fails(
        "expert1: the statistic does not fit tensor 'w', whose shape is (2,)", statistics=[state, {"w": np.ones(3, np.float32)}]
    )
    fails("average uses no statistics: leave them out", method="average", statistics=[state, state])
    fails(
        "merge_state_dicts: fisher needs weights of at least 0, but expert1 has -1",
        statistics=[state, state],
        weights=[2, -1],
    )
    fails("the weights sum to zero, so they cannot be normalized", statistics=[state, state], weights=[0, 0])
