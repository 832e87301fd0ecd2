from __future__ import annotations

import math
from collections.abc import Mapping
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge.tensors.random import drop, stream_key
from tests.helpers import reference, strategies
from tests.methods.one_tensor import assert_same_bits, merge_tensor

OPTIONS = st.fixed_dictionaries(
    {"rescale": st.booleans(), "elect": st.sampled_from(["none", "sign"]), "aggregate": st.sampled_from(["sum", "mean"])}
)
ONES_N, ZEROS_N = np.ones(40_000, np.float32), np.zeros(40_000, np.float32)


def masks(seed: int, experts: int, size: int, density: float, tensor: str = "w") -> np.ndarray:
    keys = [int(stream_key(seed, f"expert{k}", tensor)) for k in range(experts)]
    return np.stack([reference.dare_mask(key, size, density) for key in keys])


def dropped(size: int = 40_000, *, tensor: str = "w", expert: str = "math", **parameters: Any) -> np.ndarray:
    """What DARE makes of a task vector of ones on a base of zeros."""
    base, experts = {tensor: ZEROS_N[:size]}, {expert: {tensor: ONES_N[:size]}}
    return moerge.merge_state_dicts(base, experts, method="dare", scale=1, threads=1, **parameters)[tensor]


@given(st.data(), strategies.stacks(rows=4), st.sampled_from([0.25, 0.5, 1.0]), strategies.scales(), st.integers(0, 99), OPTIONS)
def test_it_is_the_formula_to_the_bit_where_dividing_by_the_density_is_exact(
    data: st.DataObject, stack: np.ndarray, density: float, scale: float, seed: int, options: Mapping[str, Any]
) -> None:
    weights = data.draw(strategies.weights(3))
    settings = {"density": density, "scale": scale, **options}
    expected_N = reference.dare(stack[0], stack[1:], masks(seed, 3, stack.shape[1], density), weights, **settings)
    assert_same_bits(merge_tensor("dare", stack[0], stack[1:], weights=weights, seed=seed, **settings), expected_N)


@given(strategies.stacks(rows=4, exact=True), strategies.densities(), st.integers(0, 99), OPTIONS)
def test_it_is_within_float32_rounding_of_the_truth(
    stack: np.ndarray, density: float, seed: int, options: Mapping[str, Any]
) -> None:
    exact, weights, settings = stack.astype(np.float64), [1, 0.5, 2], {"density": density, "scale": 1 / 3, **options}
    if options["rescale"]:
        settings["density"] = max(density, 0.01)
    kept_EN = masks(seed, 3, stack.shape[1], settings["density"])
    expected_N = reference.dare(exact[0], exact[1:], kept_EN, weights, **settings)
    actual_N = merge_tensor("dare", stack[0], stack[1:], weights=weights, seed=seed, **settings)
    np.testing.assert_allclose(actual_N, expected_N, rtol=1e-6, atol=1e-5 / settings["density"])


@given(st.data(), strategies.stacks(), strategies.scales(), st.integers(0, 2**70))
def test_density_one_is_task_arithmetic(data: st.DataObject, stack: np.ndarray, scale: float, seed: int) -> None:
    weights = data.draw(strategies.weights(len(stack)))
    actual_N = merge_tensor("dare", stack[0], stack, weights=weights, density=1, scale=scale, seed=seed)
    assert_same_bits(actual_N, merge_tensor("task_arithmetic", stack[0], stack, weights=weights, scale=scale))


@given(strategies.models(), OPTIONS)
def test_election_at_density_one_is_ties_at_density_one(
    models: tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]], options: Mapping[str, Any]
) -> None:
    base, experts = models
    settings = {**options, "elect": "sign", "density": 1, "threads": 1}
    elected = moerge.merge_state_dicts(base, experts, method="dare", **settings)
    trimmed = moerge.merge_state_dicts(base, experts, method="ties", density=1, aggregate=options["aggregate"], threads=1)
    for name in base:
        assert_same_bits(elected[name], trimmed[name])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8, 0.999])
def test_the_kept_fraction_is_the_density_and_survivors_are_divided_by_it(density: float) -> None:
    merged_N = dropped(density=density)
    sigma = math.sqrt(density * (1 - density) / merged_N.size)
    assert abs(np.count_nonzero(merged_N) / merged_N.size - density) < 5 * sigma
    assert set(merged_N.tolist()) == {0, float(np.float32(1 / density))}
    assert set(dropped(density=density, rescale=False).tolist()) == {0, 1}


@pytest.mark.parametrize("density", [0.1, 0.5, 0.8])
def test_the_mean_over_seeds_is_the_task_vector(density: float) -> None:
    tau_N, draws = np.random.default_rng(0).standard_normal(64).astype(np.float32), 4000
    tau_EN = np.tile(tau_N, (draws, 1))
    drop(tau_EN, np.array([stream_key(seed, "math", "w") for seed in range(draws)]), 0, density, np.float32(1 / density))
    deviation_N = (tau_EN.mean(axis=0, dtype=np.float64) - tau_N) / (np.abs(tau_N) * math.sqrt((1 / density - 1) / draws))
    assert np.all(np.abs(deviation_N) < 5)
    assert np.mean(deviation_N**2) == pytest.approx(1, abs=5 * math.sqrt(2 / 64))


def test_masks_of_seeds_experts_tensors_and_neighbours_are_independent() -> None:
    kept_N = dropped(density=0.5) > 0
    sigma = math.sqrt(0.25 * 0.75 / kept_N.size)
    others = {
        "seed": dropped(density=0.5, seed=1) > 0,
        "expert": dropped(density=0.5, expert="code") > 0,
        "tensor": dropped(density=0.5, tensor="v") > 0,
        "next": np.roll(kept_N, 1),
        "next but one": np.roll(kept_N, 2),
    }
    for name, other_N in others.items():
        assert abs(np.count_nonzero(kept_N & other_N) / kept_N.size - 0.25) < 5 * sigma, name


def test_a_higher_density_keeps_all_that_a_lower_one_keeps() -> None:
    low_N, high_N = (dropped(density=density) > 0 for density in (0.3, 0.6))
    assert np.all(high_N[low_N])
    assert high_N.sum() > low_N.sum()


@given(st.integers(1, 200), st.integers(0, 5))
def test_an_entrys_fate_does_not_depend_on_how_many_follow_it(size: int, seed: int) -> None:
    assert_same_bits(dropped(size, seed=seed), dropped(300, seed=seed)[:size])


def test_other_tensors_and_experts_change_nothing() -> None:
    rng = np.random.default_rng(0)
    names = ["a", "b", "c"]
    base = {name: np.zeros(999, np.float32) for name in names}
    math_expert, code_expert = ({name: rng.standard_normal(999).astype(np.float32) for name in names} for _ in range(2))
    zero_expert = {name: np.zeros(999, np.float32) for name in names}

    def merged(experts: dict[str, dict[str, np.ndarray]], kept: list[str]) -> dict[str, np.ndarray]:
        chosen = {key: {name: expert[name] for name in kept} for key, expert in experts.items()}
        return moerge.merge_state_dicts({name: base[name] for name in kept}, chosen, method="dare", threads=2, density=0.5)

    both = {"math": math_expert, "code": code_expert}
    whole = merged(both, names)
    for name in names:
        assert_same_bits(merged(both, [name])[name], whole[name])
        assert_same_bits(merged(dict(reversed(both.items())), names[::-1])[name], whole[name])
        alone = merged({"math": math_expert}, names)[name]
        assert_same_bits(merged({"zero": zero_expert, "math": math_expert}, names)[name], alone)


@given(strategies.stacks(rows=4, exact=True), st.randoms())
def test_the_order_of_named_experts_does_not_matter(stack: np.ndarray, random: Random) -> None:
    base, experts = {"w": stack[0]}, {f"expert {k}": {"w": theta_N} for k, theta_N in enumerate(stack[1:])}
    shuffled = {name: experts[name] for name in random.sample(list(experts), 3)}
    settings = {"method": "dare", "density": 0.5, "threads": 1}
    merged = moerge.merge_state_dicts(base, experts, **settings)["w"]
    np.testing.assert_array_equal(moerge.merge_state_dicts(base, shuffled, **settings)["w"], merged)


def test_the_defaults_are_mergemes() -> None:
    base_N, theta_EN = np.zeros(50, np.float32), np.full((2, 50), 3, np.float32)
    expected_N = reference.dare(base_N, theta_EN, masks(0, 2, 50, 0.8), [1, 1], density=0.8, scale=1 / 3)
    np.testing.assert_allclose(merge_tensor("dare", base_N, theta_EN), expected_N, rtol=1e-6)
