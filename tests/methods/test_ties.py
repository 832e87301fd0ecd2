from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from tests.helpers import reference, strategies
from tests.methods.one_tensor import as_float64, assert_same_models, merge_tensor

Model = dict[str, np.ndarray]
Models = tuple[Model, list[Model]]
OPTIONS = st.fixed_dictionaries({"scope": st.sampled_from(["tensor", "model"]), "aggregate": st.sampled_from(["sum", "mean"])})


def merge_ties(base: Model, experts: Any, **parameters: Any) -> Model:
    return moerge.merge_state_dicts(base, experts, method="ties", threads=1, **parameters)


@given(st.data(), strategies.models(), strategies.densities(), strategies.scales(), OPTIONS)
def test_it_is_the_algorithm_to_the_bit(
    data: st.DataObject, models: Models, density: float, scale: float, options: Mapping[str, Any]
) -> None:
    base, experts = models
    weights = data.draw(strategies.weights(len(experts)))
    settings = {"density": density, "scale": scale, **options}
    assert_same_models(merge_ties(base, experts, weights=weights, **settings), reference.ties(base, experts, weights, **settings))


@given(st.data(), strategies.models(exact=True), strategies.densities(), OPTIONS)
def test_it_is_within_float32_rounding_of_the_truth(
    data: st.DataObject, models: Models, density: float, options: Mapping[str, Any]
) -> None:
    base, experts = models
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(experts), max_size=len(experts)))
    settings = {"density": density, "scale": 1 / 3, **options}
    expected = reference.ties(as_float64(base), [as_float64(expert) for expert in experts], weights, **settings)
    merged = merge_ties(base, experts, weights=weights, **settings)
    for name in base:
        np.testing.assert_allclose(merged[name], expected[name], rtol=3e-7, atol=1e-5)


@given(strategies.models(exact=True), strategies.densities(), OPTIONS, st.randoms())
def test_the_order_of_experts_does_not_matter(models: Models, density: float, options: Mapping[str, Any], random: Random) -> None:
    base, experts = models
    shuffled = random.sample(experts, len(experts))
    merged = merge_ties(base, shuffled, density=density, **options)
    assert_same_models(merged, merge_ties(base, experts, density=density, **options))


@given(st.data(), strategies.stacks(rows=2, max_size=40), strategies.densities())
def test_the_kept_count_is_the_density_times_the_size_rounded_up(data: st.DataObject, stack: np.ndarray, density: float) -> None:
    size = stack.shape[1]
    distinct_N = np.arange(1, size + 1, dtype=np.float32) * data.draw(st.sampled_from([1, -1]))
    tau_N = np.array(data.draw(st.permutations(distinct_N.tolist())), np.float32)
    merged_N = merge_tensor("ties", np.zeros(size, np.float32), tau_N[None], density=density, scale=1)
    kept = np.flatnonzero(merged_N)
    assert len(kept) == reference.kept_count(density, size)
    assert np.abs(tau_N[kept]).min() > size - len(kept)


def test_entries_equal_to_the_threshold_are_all_kept() -> None:
    tau_EN = np.array([[5, 1, -1, 1, 0, 0.5]], np.float32)
    for density in (2 / 6, 3 / 6, 4 / 6):
        merged_N = merge_tensor("ties", np.zeros(6, np.float32), tau_EN, density=density, scale=1)
        np.testing.assert_array_equal(merged_N, [5, 1, -1, 1, 0, 0])


def test_the_sign_is_elected_by_total_magnitude_not_by_count() -> None:
    tau_EN = np.array([[3, -3], [-1, 1], [-1, 1]], np.float32)
    merged_N = merge_tensor("ties", np.zeros(2, np.float32), tau_EN, density=1, scale=1)
    np.testing.assert_array_equal(merged_N, [3, -3])


def test_signs_that_cancel_elect_plus() -> None:
    tau_EN = np.array([[2, -1], [-2, 1]], np.float32)
    for order in (tau_EN, tau_EN[::-1]):
        np.testing.assert_array_equal(merge_tensor("ties", np.zeros(2, np.float32), order, density=1, scale=1), [2, 1])


def test_weights_count_before_the_election_and_in_the_mean() -> None:
    zeros_N, tau_EN = np.zeros(1, np.float32), np.array([[1], [-3], [2]], np.float32)
    options = {"density": 1, "scale": 1, "weights": [4, 1, 1]}
    np.testing.assert_array_equal(merge_tensor("ties", zeros_N, tau_EN, **options), [6])
    np.testing.assert_array_equal(merge_tensor("ties", zeros_N, tau_EN, aggregate="mean", **options), np.float32([6 / 5]))


def test_the_mean_leaves_out_trimmed_entries() -> None:
    zeros_N, tau_EN = np.zeros(2, np.float32), np.array([[4, 1], [1, 2]], np.float32)
    merged_N = merge_tensor("ties", zeros_N, tau_EN, density=0.5, aggregate="mean", scale=1)
    np.testing.assert_array_equal(merged_N, [4, 2])


def test_model_scope_trims_a_weak_tensor_away() -> None:
    base = {"strong": np.zeros(4, np.float32), "weak": np.zeros(4, np.float32)}
    expert = {"strong": np.float32([4, 5, 6, 7]), "weak": np.float32([0.1, 0.4, 0.3, 0.2])}
    whole = merge_ties(base, [expert], density=0.5, scale=1, scope="model")
    assert_same_models(whole, {"strong": expert["strong"], "weak": base["weak"]})
    each = merge_ties(base, [expert], density=0.5, scale=1, scope="tensor")
    assert_same_models(each, {"strong": np.float32([0, 0, 6, 7]), "weak": np.float32([0, 0.4, 0.3, 0])})


def test_the_defaults_are_mergemes() -> None:
    base, experts = {"w": np.zeros(10, np.float32)}, [{"w": np.arange(1, 11, dtype=np.float32)}] * 2
    expected = reference.ties(base, experts, [1, 1], density=0.8, scale=1 / 3, scope="tensor", aggregate="sum")
    assert_same_models(merge_ties(base, experts), expected)


@pytest.mark.parametrize(
    ("parameter", "value", "complaint"),
    [
        ("density", 0, "should be greater than 0, not 0"),
        ("density", 1.5, "should be less than or equal to 1, not 1.5"),
        ("density", float("nan"), "should be a finite number, not nan"),
        ("scope", "layer", "should be 'tensor' or 'model', not 'layer'"),
        ("aggregate", "max", "should be 'sum' or 'mean', not 'max'"),
        ("scale", float("inf"), "should be a finite number, not inf"),
    ],
)
def test_bad_parameters_are_named(parameter: str, value: Any, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        merge_ties({}, [{}], **{parameter: value})
    assert str(error.value) == f"merge_state_dicts(method='ties'): {parameter} {complaint}"
