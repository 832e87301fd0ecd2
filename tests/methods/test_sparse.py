"""Magnitude pruning, DELLA and breadcrumbs: what they keep, whatever is done with it afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from moerge.learning.directions import Directions
from moerge.methods import merge_method
from moerge.operations.operations import Merge
from moerge.tensors.dtypes import F32
from moerge.tensors.random import stream_key
from moerge.tensors.source import Source
from moerge.tensors.tensor import ArrayTensor
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

SUMS = st.fixed_dictionaries({"elect": st.sampled_from(["none", "sign"]), "aggregate": st.sampled_from(["sum", "mean"])})
ONE = {"scale": 1, "aggregate": "sum", "elect": "none"}
ALL_KEPT: dict[str, dict[str, Any]] = {
    "magnitude_pruning": {},
    "breadcrumbs": {"gamma": 0},
    "della": {"epsilon": 0},
}
KEYS = [int(stream_key(7, f"expert{k}", "w")) for k in range(4)]


def merge(method: str, base: np.ndarray, thetas: np.ndarray, **settings: Any) -> np.ndarray:
    experts = [{"w": theta} for theta in thetas]
    return moerge.merge_state_dicts({"w": base}, experts, method=method, threads=1, **settings)["w"]


@given(st.data(), strategies.stacks(rows=4), strategies.densities(), strategies.scales(), SUMS, st.booleans())
def test_pruning_is_the_formula_to_the_bit(
    data: st.DataObject, stack: np.ndarray, density: float, scale: float, sums: Mapping[str, Any], rescale: bool
) -> None:
    weights, columns = data.draw(strategies.weights(3)), data.draw(strategies.columns(stack.shape[1]))
    density = max(density, 0.01) if rescale else density
    settings = {"density": density, "scale": scale, "rescale": rescale, "weights": weights, **sums}
    tau_EN = reference.task_vectors(stack[0], stack[1:])
    for scope, size in (("tensor", stack.shape[1]), ("row", columns)):
        left_EN = np.stack([reference.by_rows(tau_N, size, lambda row_C: reference.pruned(row_C, density)) for tau_N in tau_EN])
        left_EN = left_EN * np.float32(1 / density) if rescale else left_EN
        expected_N = reference.add_scaled(stack[0], reference.merged_sum(left_EN, weights, **sums), scale)
        shaped = stack.reshape(4, -1, columns)
        assert_same_bits(merge("magnitude_pruning", shaped[0], shaped[1:], scope=scope, **settings).reshape(-1), expected_N)


@given(
    st.data(),
    strategies.stacks(rows=4),
    strategies.densities(),
    st.sampled_from([0.0, 0.01, 0.1, 0.3, 0.9]),
    strategies.scales(),
    SUMS,
)
def test_breadcrumbs_is_the_formula_to_the_bit(
    data: st.DataObject, stack: np.ndarray, density: float, gamma: float, scale: float, sums: Mapping[str, Any]
) -> None:
    weights, columns = data.draw(strategies.weights(3)), data.draw(strategies.columns(stack.shape[1]))
    tau_EN = reference.task_vectors(stack[0], stack[1:])
    for scope, size in (("tensor", stack.shape[1]), ("row", columns)):
        rows = [reference.by_rows(tau_N, size, lambda row_C: reference.breadcrumbs(row_C, density, gamma)) for tau_N in tau_EN]
        expected_N = reference.add_scaled(stack[0], reference.merged_sum(np.stack(rows), weights, **sums), scale)
        shaped = stack.reshape(4, -1, columns)
        settings = {"density": density, "gamma": gamma, "scale": scale, "weights": weights, **sums}
        assert_same_bits(merge("breadcrumbs", shaped[0], shaped[1:], scope=scope, **settings).reshape(-1), expected_N)


@given(
    st.data(), strategies.stacks(rows=4), st.sampled_from([(0.5, 0.1), (0.3, 0.2), (0.9, 0.0), (1.0, 0.3)]), SUMS, st.booleans()
)
def test_della_is_the_formula_to_the_bit(
    data: st.DataObject, stack: np.ndarray, window: tuple[float, float], sums: Mapping[str, Any], rescale: bool
) -> None:
    weights, columns = data.draw(strategies.weights(3)), data.draw(strategies.columns(stack.shape[1]))
    tau_EN = reference.task_vectors(stack[0], stack[1:])
    left = [reference.della(tau_N, columns, key, *window, rescale=rescale) for tau_N, key in zip(tau_EN, KEYS[:3], strict=True)]
    expected_N = reference.add_scaled(stack[0], reference.merged_sum(np.stack(left), weights, **sums), 0.5)
    shaped = stack.reshape(4, -1, columns)
    settings = {
        "density": window[0],
        "epsilon": window[1],
        "rescale": rescale,
        "scale": 0.5,
        "weights": weights,
        "seed": 7,
        **sums,
    }
    assert_same_bits(merge("della", shaped[0], shaped[1:], **settings).reshape(-1), expected_N)


@given(strategies.models(), SUMS, strategies.densities(), st.sampled_from(["tensor", "model"]))
def test_pruning_with_an_election_is_ties(
    models: tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]], sums: Mapping[str, Any], density: float, scope: str
) -> None:
    settings = {"density": density, "aggregate": sums["aggregate"], "scope": scope, "threads": 1}
    base, experts = models
    pruned = moerge.merge_state_dicts(base, experts, method="magnitude_pruning", elect="sign", **settings)
    ties = moerge.merge_state_dicts(base, experts, method="ties", **settings)
    for name in base:
        assert_same_bits(pruned[name], ties[name])


@given(strategies.models(), strategies.densities(), st.sampled_from([0.0, 0.05, 0.4]))
def test_breadcrumbs_of_the_model_are_those_of_one_long_tensor(
    models: tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]], density: float, gamma: float
) -> None:
    base, experts = models
    settings = {"method": "breadcrumbs", "density": density, "gamma": gamma, "threads": 1}
    parts = moerge.merge_state_dicts(base, experts, scope="model", **settings)
    joined = [{"w": np.concatenate([model[name] for name in base])} for model in (base, *experts)]
    whole = moerge.merge_state_dicts(joined[0], joined[1:], **settings)["w"]
    assert_same_bits(np.concatenate([parts[name] for name in base]), whole)


@pytest.mark.parametrize("method", ALL_KEPT)
@given(stack=strategies.stacks())
def test_density_one_is_task_arithmetic_and_one_expert_is_itself(method: str, stack: np.ndarray) -> None:
    settings = {**ONE, **ALL_KEPT[method], "density": 1}
    expected_N = merge("task_arithmetic", stack[0], stack, scale=1)
    assert_same_bits(merge(method, stack[0], stack, **settings), expected_N)
    exact = np.round(stack).astype(np.float32)
    np.testing.assert_array_equal(merge(method, exact[0], exact[-1:], **settings), exact[-1])


@pytest.mark.parametrize("method", ALL_KEPT)
@given(stack=strategies.stacks(rows=1), density=st.sampled_from([0.4, 1.0]))
def test_experts_that_are_the_base_give_the_base(method: str, stack: np.ndarray, density: float) -> None:
    merged_N = merge(method, stack[0], np.repeat(stack, 3, axis=0), density=density)
    np.testing.assert_array_equal(merged_N, stack[0])


@pytest.mark.parametrize("method", ALL_KEPT)
@given(stack=strategies.stacks(rows=4, exact=True), random=st.randoms(), sums=SUMS)
def test_the_order_of_named_experts_does_not_matter(
    method: str, stack: np.ndarray, random: Random, sums: Mapping[str, Any]
) -> None:
    base, experts = {"w": stack[0]}, {f"expert {k}": {"w": theta_N} for k, theta_N in enumerate(stack[1:])}
    shuffled = {name: experts[name] for name in random.sample(list(experts), 3)}
    # halves and quarters stay exact through rescaling by 1 and sums; DELLA's own probabilities do not
    settings = {**sums, "method": method, "density": 0.5, "threads": 1, **({"rescale": False} if method == "della" else {})}
    merged_N = moerge.merge_state_dicts(base, experts, **settings)["w"]
    np.testing.assert_array_equal(moerge.merge_state_dicts(base, shuffled, **settings)["w"], merged_N)


@given(st.data(), st.integers(1, 60), strategies.densities(), st.sampled_from([0.0, 0.01, 0.1, 0.25]))
def test_kept_counts_of_distinct_entries(data: st.DataObject, size: int, density: float, gamma: float) -> None:
    tau_N = np.array(data.draw(st.permutations(range(1, size + 1))), np.float32) * np.float32(data.draw(st.sampled_from([1, -1])))
    zeros_N, kept = np.zeros(size, np.float32), reference.kept_count(density, size)
    pruned_N = merge("magnitude_pruning", zeros_N, tau_N[None], density=density, **ONE)
    assert sorted(np.abs(pruned_N[pruned_N != 0])) == list(range(size - kept + 1, size + 1))
    left_N = merge("breadcrumbs", zeros_N, tau_N[None], density=density, gamma=gamma, **ONE)
    largest = size - min(int(gamma * 100) * size // 100, size - kept)
    assert sorted(np.abs(left_N[left_N != 0])) == list(range(largest - kept + 1, largest + 1))


def test_equal_entries_are_all_kept_by_breadcrumbs() -> None:
    equal_N = np.full(10, 3, np.float32)
    np.testing.assert_array_equal(
        merge("breadcrumbs", np.zeros(10, np.float32), equal_N[None], density=0.5, gamma=0.2, **ONE), equal_N
    )


def test_breadcrumbs_keeps_small_tensors_that_mergekit_sets_to_zero() -> None:
    tau_N = np.arange(1, 21, dtype=np.float32)
    assert int(0.01 * 20) == 0
    kept_N = merge("breadcrumbs", np.zeros(20, np.float32), tau_N[None], density=0.9, gamma=0.01, **ONE)
    np.testing.assert_array_equal(kept_N, [0, 0, *tau_N[2:]])


def test_della_keeps_each_entry_as_often_as_its_rank_says() -> None:
    rows, columns = 20_000, 5
    row_C = np.array([0.5, -4, 2, 1, -3], np.float32)
    tau = np.tile(row_C, (rows, 1))
    merged = merge("della", np.zeros_like(tau), tau[None], density=0.5, epsilon=0.2, **ONE)
    kept_C = reference.della_probabilities(row_C, 0.5, 0.2)
    np.testing.assert_allclose(kept_C, [0.3, 0.7, 0.5, 0.4, 0.6], rtol=1e-12)
    frequency_C = (merged != 0).mean(axis=0)
    assert np.all(np.abs(frequency_C - kept_C) < 5 * np.sqrt(kept_C * (1 - kept_C) / rows))
    for column in range(columns):
        assert set(merged[:, column].tolist()) == {0, float(np.float32(row_C[column] / kept_C[column]))}


def test_della_of_three_dimensions_ranks_along_the_last() -> None:
    tau = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    cube = merge("della", np.zeros_like(tau), tau[None], seed=7)
    flat = merge("della", np.zeros((12, 5), np.float32), tau.reshape(1, 12, 5), seed=7)
    assert_same_bits(cube.reshape(12, 5), flat)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("della", {"elect": "none", "aggregate": "sum", "density": [0.3, 0.5, 1]}),
        ("della", {"aggregate": "sum"}),
        ("breadcrumbs", {"scope": "row", "gamma": 0.2, "density": 0.5}),
        ("magnitude_pruning", {"scope": "row", "density": 0.5, "rescale": True, "elect": "sign"}),
        ("ties", {"density": 1}),
        ("dare", {"density": 0.5, "elect": "sign"}),
    ],
)
def test_what_coefficients_are_learned_for_adds_up_to_the_merge(method: str, settings: dict[str, Any]) -> None:
    stack = np.random.default_rng(0).integers(-50, 50, (4, 6, 8)).astype(np.float32)
    tensors = [ArrayTensor("w", F32, array.shape, array.reshape(-1)) for array in stack]
    base, *experts = [
        Source(name, tensor) for name, tensor in zip(("base", "expert0", "expert1", "expert2"), tensors, strict=True)
    ]
    with ThreadPoolExecutor(1) as pool:
        learned_for = Merge(merge_method(method)(**settings), tuple(experts), (1.0, 1.0, 1.0), base)
        directions = Directions(learned_for, pool).read()
    expected = merge(method, stack[0], stack[1:], scale=1, **settings)
    np.testing.assert_allclose(stack[0] + directions.sum(axis=0).reshape(6, 8), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "settings", "complaint"),
    [
        (
            "della",
            {"density": 0.5, "epsilon": 0.5},
            "epsilon should be below 0.5, so that probabilities stay within 0 and 1, not 0.5",
        ),
        (
            "della",
            {"density": [0.5, 0.95], "epsilon": 0.1},
            "epsilon should be below 0.05, so that probabilities stay within 0 and 1, not 0.1",
        ),
        ("della", {"density": 0}, "density should be greater than 0, not 0"),
        ("breadcrumbs", {"gamma": 1}, "gamma should be less than 1, not 1"),
        ("breadcrumbs", {"density": {"expert0": 0.5, "expert1": 2}}, "density.expert1 should be less than or equal to 1, not 2"),
        ("breadcrumbs", {"scope": "layer"}, "scope should be 'row', 'tensor' or 'model', not 'layer'"),
    ],
)
def test_bad_parameters_are_named(method: str, settings: dict[str, Any], complaint: str) -> None:
    zeros = np.zeros((2, 3), np.float32)
    with pytest.raises(InputError) as error:
        merge_tensor(method, zeros[0], zeros, **settings)
    assert str(error.value) == f"merge_state_dicts(method={method!r}): {complaint}"
