"""Hyperparameters with a value for each expert: a mapping of names, or a list in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from moerge.methods import merge_method
from tests.helpers import reference, strategies, tiny
from tests.methods.one_tensor import assert_same_bits

DENSITIES = st.lists(strategies.densities(), min_size=3, max_size=3)


def merge(method: str, stack: np.ndarray, **settings: Any) -> np.ndarray:
    named = dict(zip(("math", "code", "knowledge"), stack[1:], strict=True))
    experts = {name: {"w": theta_N} for name, theta_N in named.items()}
    return moerge.merge_state_dicts({"w": stack[0]}, experts, method=method, threads=1, **settings)["w"]


def by_name(values: list[float]) -> dict[str, float]:
    return dict(zip(("knowledge", "math", "code"), (values[2], values[0], values[1]), strict=True))


@given(strategies.stacks(rows=4), DENSITIES, st.sampled_from(["tensor", "model"]))
def test_ties_trims_each_expert_at_its_own_density(stack: np.ndarray, densities: list[float], scope: str) -> None:
    tau_EN = reference.task_vectors(stack[0], stack[1:])
    trimmed_EN = np.stack([reference.pruned(tau_N, density) for tau_N, density in zip(tau_EN, densities, strict=True)])
    expected_N = reference.add_scaled(stack[0], reference.disjoint_merge(trimmed_EN, [1, 1, 1], "sum"), 1 / 3)
    assert_same_bits(merge("ties", stack, density=densities, scope=scope), expected_N)
    assert_same_bits(merge("ties", stack, density=by_name(densities), scope=scope), expected_N)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("dare", {"density": [0.25, 1.0, 0.5]}),
        ("magnitude_pruning", {"density": [0.3, 1.0, 0.8], "scope": "row"}),
        ("magnitude_pruning", {"density": [0.3, 1.0, 0.8], "rescale": True}),
        ("breadcrumbs", {"density": [0.5, 0.6, 1.0], "gamma": [0.3, 0.0, 0.1]}),
        ("breadcrumbs", {"density": 0.5, "gamma": [0.3, 0.0, 0.1], "scope": "row"}),
        ("della", {"density": [0.5, 0.6, 1.0], "epsilon": [0.3, 0.0, 0.1], "elect": "none", "aggregate": "sum"}),
        ("della", {"density": 0.5, "epsilon": [0.3, 0.0, 0.1], "elect": "none", "aggregate": "sum"}),
    ],
)
@given(stack=strategies.stacks(rows=4, exact=True))
def test_each_expert_is_thinned_as_it_would_be_alone(method: str, settings: dict[str, Any], stack: np.ndarray) -> None:
    zeros_N = np.zeros_like(stack[0])
    alone = []
    for k, name in enumerate(("math", "code", "knowledge")):
        own = {key: value[k] if isinstance(value, list) else value for key, value in settings.items()}
        expert = {name: {"w": stack[1 + k]}}
        alone.append(moerge.merge_state_dicts({"w": zeros_N}, expert, method=method, threads=1, scale=1, **own)["w"])
    stack[0] = 0
    named = {key: by_name(value) if isinstance(value, list) else value for key, value in settings.items()}
    expected_N = reference.in_order(alone)
    for given_as in (settings, named):
        np.testing.assert_array_equal(merge(method, stack, scale=1, **given_as), expected_N)


def test_a_recipe_names_experts_and_the_plan_shows_their_values_in_order(tmp_path: Path) -> None:
    models = tiny.make_models(tmp_path)
    densities = {"knowledge": 1, "math": 0.25, "code": 0.5}
    recipe = tiny.write_recipe(tmp_path, merge={"method": "ties", "density": densities, "scope": "model"})
    result = moerge.merge(recipe, tmp_path / "out")
    assert {made.hyperparameters for made in result.plan.outputs} == {
        "scale 0.3333, density 0.25/0.5/1, aggregate sum, scope model"
    }
    base, *experts = (tiny.read_values(models[name]) for name in ("base", *tiny.EXPERTS))
    expected = moerge.merge_state_dicts(base, experts, method="ties", density=[0.25, 0.5, 1], scope="model")
    for name, merged in tiny.read_values(tmp_path / "out").items():
        np.testing.assert_allclose(merged, expected[name], rtol=2**-8)


@pytest.mark.parametrize(
    ("density", "complaint"),
    [
        (
            {"math": 0.5, "code": 0.5, "knowlege": 0.5},
            "ties: 'density' names 'knowlege', which is not an expert: did you mean 'knowledge'?",
        ),
        ({"math": 0.5, "code": 0.5}, "ties: 'density' has no value for the expert 'knowledge': add one"),
        ([0.5, 0.5], "ties: 'density' has 2 values for 3 experts"),
    ],
)
def test_names_and_numbers_have_to_fit_the_experts(tmp_path: Path, density: Any, complaint: str) -> None:
    tiny.make_models(tmp_path)
    recipe = tiny.write_recipe(tmp_path, merge={"method": "ties", "density": density})
    with pytest.raises(InputError) as error:
        moerge.plan(recipe)
    assert str(error.value).endswith(f": merge: {complaint}")
    with pytest.raises(InputError) as error:
        merge("ties", np.zeros((4, 2), np.float32), density=density)
    assert str(error.value) == complaint


@pytest.mark.parametrize(
    ("density", "complaint"),
    [
        ({"math": 2}, "density.math should be less than or equal to 1, not 2"),
        ([0.5, 0], "density[1] should be greater than 0, not 0"),
        ("high", "density should be a number, not 'high'"),
    ],
)
def test_bad_values_are_named(density: Any, complaint: str) -> None:
    with pytest.raises(InputError) as error:
        moerge.merge_state_dicts({}, [{}], method="ties", density=density)
    assert str(error.value) == f"merge_state_dicts(method='ties'): {complaint}"


def test_methods_with_values_by_expert_are_equal_and_hashable_as_others_are() -> None:
    ties = merge_method("ties")
    assert ties(density={"a": 0.5, "b": 1.0}) == ties(density={"b": 1.0, "a": 0.5})
    assert hash(ties(density={"a": 0.5, "b": 1.0})) == hash(ties(density={"b": 1.0, "a": 0.5}))
    assert ties(density={"a": 0.5, "b": 1.0}).for_experts(["b", "a"]) == ties(density=[1.0, 0.5])
    assert ties(density={"a": 0.5}).model_dump()["density"] == {"a": 0.5}
