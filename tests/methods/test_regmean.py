"""RegMean of what is given: the least squares solution, and what it falls back to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from moerge.methods.regmean import RegMean, triangle, unpack

Matrices = Sequence[np.ndarray]


def regmean(weights_EOI: Matrices, grams_EII: Matrices, **options: Any) -> np.ndarray:
    experts = [{"w": np.asarray(weight_OI, np.float32)} for weight_OI in weights_EOI]
    statistics = [{"w": gram_II} for gram_II in grams_EII]
    return moerge.merge_state_dicts(None, experts, method="regmean", statistics=statistics, threads=1, **options)["w"]


def drawn(seed: int, *, experts: int = 3, outputs: int = 5, inputs: int = 7, tokens: int = 40) -> tuple[Matrices, Matrices]:
    """Layers, and inputs of each whose features are correlated and of very different size, as hidden states are."""
    rng = np.random.default_rng(seed)
    mixing_II = rng.standard_normal((inputs, inputs)) * np.exp(rng.normal(0, 1, inputs))
    weights = rng.standard_normal((experts, outputs, inputs)).astype(np.float32)
    return list(weights), [rng.standard_normal((tokens, inputs)) @ mixing_II for _ in range(experts)]


def gram(inputs_TI: np.ndarray) -> np.ndarray:
    return inputs_TI.T @ inputs_TI / len(inputs_TI)


def shrunk(gram_II: np.ndarray, alpha: float) -> np.ndarray:
    return alpha * gram_II + (1 - alpha) * np.diag(np.diag(gram_II))


@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 6), st.integers(1, 8), st.floats(0, 0.95))
def test_it_is_the_closed_form(seed: int, experts: int, outputs: int, inputs: int, alpha: float) -> None:
    weights, states = drawn(seed, experts=experts, outputs=outputs, inputs=inputs)
    grams = [shrunk(gram(state), alpha) for state in states]
    factors = np.random.default_rng(seed).uniform(0.5, 2, experts)
    total = sum(f * g for f, g in zip(factors, grams, strict=True))
    right = sum(f * g @ w.T.astype(np.float64) for f, g, w in zip(factors, grams, weights, strict=True))
    expected_OI = np.linalg.solve(total, right).T
    merged_OI = regmean(weights, [gram(state) for state in states], alpha=alpha, weights=factors)
    np.testing.assert_allclose(merged_OI, expected_OI, atol=2e-5 / (1 - alpha))


def test_it_minimises_the_distance_to_what_each_expert_computes() -> None:
    """At the minimum of sum_k |X_k W - X_k W_k|^2 the gradient vanishes, and every step away makes it worse."""
    weights, states = drawn(0)
    merged_OI = regmean(weights, [gram(state) for state in states], alpha=1).astype(np.float64)

    def loss(w_OI: np.ndarray) -> float:
        return sum(float(((x @ (w_OI - w).T) ** 2).mean()) for x, w in zip(states, weights, strict=True))

    gradient_OI = sum(gram(x) @ (merged_OI - w).T for x, w in zip(states, weights, strict=True))
    largest = max(float(np.abs(gram(x) @ (merged_OI - w).T).max()) for x, w in zip(states, weights, strict=True))
    assert np.abs(gradient_OI).max() < 1e-4 * largest
    average_OI = np.mean(weights, axis=0)
    assert loss(merged_OI) < 0.95 * loss(average_OI)
    rng = np.random.default_rng(1)
    for _ in range(20):
        assert loss(merged_OI + 0.01 * rng.standard_normal(merged_OI.shape)) > loss(merged_OI)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 1.0])
def test_equal_inputs_give_the_average(alpha: float) -> None:
    weights, states = drawn(2)
    merged_OI = regmean(weights, [gram(states[0])] * 3, alpha=alpha)
    np.testing.assert_allclose(merged_OI, np.mean(weights, axis=0), atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_one_expert_stays_what_it_is(alpha: float) -> None:
    weights, states = drawn(3, experts=1)
    np.testing.assert_array_equal(regmean(weights, [gram(states[0])], alpha=alpha), weights[0])


def test_alpha_zero_is_a_weighted_mean_of_each_input() -> None:
    weights, states = drawn(4)
    diagonals_EI = np.array([np.diag(gram(state)) for state in states])
    expected_OI = sum(d * w for d, w in zip(diagonals_EI, weights, strict=True)) / diagonals_EI.sum(axis=0)
    np.testing.assert_allclose(regmean(weights, [gram(state) for state in states], alpha=0), expected_OI, atol=1e-5)


def test_inputs_that_are_always_zero_keep_the_average() -> None:
    weights, states = drawn(5)
    for state in states:
        state[:, 2] = 0
    merged_OI = regmean(weights, [gram(state) for state in states])
    np.testing.assert_allclose(merged_OI[:, 2], np.mean(weights, axis=0)[:, 2], atol=1e-6)
    kept = [0, 1, 3, 4, 5, 6]
    without_OI = regmean([w[:, kept] for w in weights], [gram(state[:, kept]) for state in states])
    np.testing.assert_allclose(merged_OI[:, kept], without_OI, atol=1e-5)


def test_fewer_tokens_than_inputs_stay_in_bounds() -> None:
    weights, _ = drawn(6, outputs=8, inputs=64)
    states = list(np.random.default_rng(6).standard_normal((3, 5, 64)))
    merged_OI = regmean(weights, [gram(state) for state in states], alpha=1)
    assert np.abs(merged_OI).max() <= 1.5 * np.abs(weights).max()


def test_bits_do_not_depend_on_threads() -> None:
    weights, states = drawn(7, outputs=96, inputs=80, tokens=300)
    experts = [{f"w{i}": np.roll(weight, i) for i in range(4)} for weight in weights]
    statistics = [{f"w{i}": gram(state) for i in range(4)} for state in states]
    merged = [
        moerge.merge_state_dicts(None, experts, method="regmean", statistics=statistics, threads=threads) for threads in (1, 3)
    ]
    for name in merged[0]:
        assert merged[0][name].tobytes() == merged[1][name].tobytes()


def test_tensors_without_a_gram_matrix_are_averaged_by_weight() -> None:
    weights, states = drawn(8, experts=2)
    experts = [{"w": w, "b": np.full(5, value, np.float32)} for w, value in zip(weights, (1.0, 4.0), strict=True)]
    statistics = [{"w": gram(state)} for state in states]
    merged = moerge.merge_state_dicts(None, experts, method="regmean", statistics=statistics, weights=[2, 1])
    np.testing.assert_array_equal(merged["b"], np.full(5, 2.0, np.float32))


def test_nan_stays_where_it_is_if_it_is_allowed() -> None:
    weights, states = drawn(9)
    weights[1][2, 3] = np.nan
    merged_OI = regmean(weights, [gram(state) for state in states], allow_nonfinite=True)
    assert np.argwhere(np.isnan(merged_OI)).tolist() == [[2, 3]]


@pytest.mark.parametrize("size", [1, 2, 17])
def test_a_triangle_is_its_matrix(size: int) -> None:
    root = np.random.default_rng(size).standard_normal((size, size))
    matrix = (root + root.T).astype(np.float32)
    packed = matrix[np.triu_indices(size)]
    assert len(packed) == triangle(size)
    out = np.empty((size, size))
    unpack(packed, 0.25, out)
    np.testing.assert_array_equal(out, np.where(np.eye(size, dtype=bool), matrix, 0.25 * matrix.astype(np.float64)))


def test_the_memory_estimate_covers_what_is_allocated() -> None:
    import tracemalloc

    from moerge.methods.method import Block

    outputs, inputs, experts = 300, 400, 3
    rng = np.random.default_rng(0)
    triangles = []
    for _ in range(experts):
        root = rng.standard_normal((inputs, inputs))
        triangles.append((root @ root.T).astype(np.float32)[np.triu_indices(inputs)])
    theta_EN = rng.standard_normal((experts, outputs * inputs)).astype(np.float32)
    empty = np.empty(outputs * inputs, np.float32)
    weights_E = np.ones(experts, np.float32)
    block = Block(theta_EN, weights_E, empty, empty, None, np.empty(0, np.uint64), 0, shape=(outputs, inputs), extras=triangles)
    RegMean().merge(block)  # compiles
    tracemalloc.start()
    RegMean().merge(block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    estimate = RegMean().scratch_bytes((outputs, inputs), experts)
    assert 0.6 * estimate < peak <= 1.01 * estimate


def test_refusals() -> None:
    state, eye = {"w": np.ones((2, 3), np.float32)}, np.eye(3)

    def fails(message: str, statistics: Any) -> None:
        with pytest.raises(InputError) as caught:
            moerge.merge_state_dicts(None, [state, state], method="regmean", statistics=statistics)
        assert str(caught.value) == message

    fails("expert1: the statistic does not fit tensor 'w', whose shape is (2, 3)", [{"w": eye}, {"w": np.eye(2)}])
    fails("expert0: the Gram matrix of 'w' has shape [2, 3]: it should be square", [{"w": np.ones((2, 3))}, {"w": eye}])
    fails("expert1 has no statistic for tensor 'w', but other experts have one", [{"w": eye}, {}])
