"""Computed routers, the parts without a model: regression, statistics that add up, directions of task vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge.errors import InputError
from moerge.recipe import load_recipe
from moerge.routers.base import router, routers
from moerge.routers.moments import GramStatistics, load_moments, read_facts, save_moments
from moerge.routers.projection import leading_directions
from moerge.routers.regression import normalize_gate, ridge
from moerge.routers.ridge import RidgeRouter
from tests.helpers import tiny

LAYERS, HIDDEN, EXPERTS = 2, 7, 3
MEAN = {"kind": "projection", "sign": "mean"}


def states(seed: int, tokens: int) -> np.ndarray:
    """Router inputs [L, T, H] with a mean of their own."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((LAYERS, tokens, HIDDEN)) + rng.standard_normal((LAYERS, 1, HIDDEN))


def moments_of(states_LTH: np.ndarray) -> GramStatistics:
    products = np.einsum("lti,ltj->lij", states_LTH, states_LTH)
    return GramStatistics(states_LTH.shape[1], states_LTH.sum(axis=1).astype(np.float32), products.astype(np.float32))


def by_hand(states_E: list[np.ndarray], layer: int, penalty: float) -> np.ndarray:
    """Least squares over rows: every token, and sqrt(lambda) I with target 0; [E, H]."""
    rows = np.concatenate([states_LTH[layer] for states_LTH in states_E])
    targets = np.concatenate([np.tile(np.eye(EXPERTS)[i], (states_LTH.shape[1], 1)) for i, states_LTH in enumerate(states_E)])
    strength = penalty * np.square(rows).sum() / HIDDEN
    rows = np.concatenate([rows, np.sqrt(strength) * np.eye(HIDDEN)])
    targets = np.concatenate([targets, np.zeros((HIDDEN, EXPERTS))])
    return np.linalg.lstsq(rows, targets, rcond=None)[0].T


@pytest.mark.parametrize("penalty", [1e-4, 0.01, 3.0])
def test_ridge_is_the_least_squares_solution(penalty: float) -> None:
    texts = [states(seed, 40 + seed) for seed in range(EXPERTS)]
    chosen = RidgeRouter(penalty=penalty, normalize="none", temperature=1.0, balance=False)
    for layer in range(LAYERS):
        gate = chosen.gate([moments_of(text) for text in texts], layer)
        np.testing.assert_allclose(gate, by_hand(texts, layer, penalty), rtol=1e-4, atol=1e-5)
        assert gate.dtype == np.float32


def test_columns_have_norm_one_over_the_temperature() -> None:
    gate = RidgeRouter().gate([moments_of(states(seed, 30)) for seed in range(EXPERTS)], 0)
    np.testing.assert_allclose(np.linalg.norm(gate, axis=1), 10, rtol=1e-6)


def test_balance_makes_the_amount_of_text_irrelevant() -> None:
    texts = [states(seed, 30) for seed in range(EXPERTS)]
    longer = [np.concatenate([texts[0]] * 5, axis=1), *texts[1:]]
    once, repeated = ([moments_of(text) for text in some] for some in (texts, longer))
    np.testing.assert_allclose(RidgeRouter().gate(once, 1), RidgeRouter().gate(repeated, 1), rtol=1e-4, atol=1e-4)
    counted = RidgeRouter(balance=False)
    assert np.abs(counted.gate(once, 1) - counted.gate(repeated, 1)).max() > 0.1


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    whole, others = states(0, 50), [states(1, 30), states(2, 30)]
    added = moments_of(whole[:, :20]) + moments_of(whole[:, 20:])
    assert added.tokens == 50
    rest = [moments_of(text) for text in others]
    for layer in range(LAYERS):
        one, two = (RidgeRouter().gate([first, *rest], layer) for first in (moments_of(whole), added))
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_saved_statistics_come_back_to_the_bit(tmp_path: Path) -> None:
    moments = moments_of(states(0, 20))
    symmetric = (moments.gram_LHH + moments.gram_LHH.transpose(0, 2, 1)) / 2
    moments = GramStatistics(20, moments.sum_LH, symmetric, {"documents": ["ab"], "path": "own"})
    save_moments(tmp_path / "stats/math.safetensors", moments)
    assert [path.name for path in (tmp_path / "stats").iterdir()] == ["math.safetensors"]
    back = load_moments(tmp_path / "stats/math.safetensors", LAYERS, HIDDEN)
    assert (back.tokens, back.facts) == (20, {"documents": ["ab"], "path": "own"})
    np.testing.assert_array_equal(back.sum_LH, moments.sum_LH)
    np.testing.assert_array_equal(back.gram_LHH, moments.gram_LHH)
    with pytest.raises(InputError, match="statistics of another model: this one has 3 layers of width 7"):
        load_moments(tmp_path / "stats/math.safetensors", 3, HIDDEN)


@pytest.mark.parametrize("content", [b"", b"text, not tensors", (4).to_bytes(8, "little") + b"{}  "])
def test_files_that_hold_no_statistics_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "math.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"math\.safetensors holds no router statistics: remove it"):
        read_facts(tmp_path / "math.safetensors")


@given(st.sampled_from(["columns", "joint", "none"]), st.sampled_from([0.1, 1.0]), st.integers(0, 10))
def test_normalisation(normalize: Any, temperature: float, seed: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((EXPERTS, HIDDEN))
    weights[1] = 0
    gate = normalize_gate(weights, normalize, temperature) * temperature
    if normalize == "columns":
        np.testing.assert_allclose(np.linalg.norm(gate, axis=1), [1, 0, 1], rtol=1e-6)
        assert (np.sign(gate) == np.sign(weights)).all()
    elif normalize == "joint":
        np.testing.assert_allclose(gate.mean(axis=0), 0, atol=1e-7)
        np.testing.assert_allclose(np.square(gate).sum(axis=1).mean(), 1, rtol=1e-6)
        assert np.linalg.matrix_rank(np.stack([(gate[0] - gate[2]), weights[0] - weights[2]]), tol=1e-5) == 1
    else:
        np.testing.assert_allclose(gate, weights, rtol=1e-6)


def test_joint_normalisation_of_equal_rows_is_zero_not_nan() -> None:
    np.testing.assert_array_equal(normalize_gate(np.ones((2, 3)), "joint", 0.1), np.zeros((2, 3)))


def test_ridge_shrinks_towards_zero() -> None:
    moment, target = np.diag([4.0, 2.0]), np.array([[1.0], [1.0]])
    np.testing.assert_allclose(ridge(moment, target, 1.0), [[1 / 7, 1 / 5]])


@pytest.mark.parametrize(("rows", "hidden", "rank"), [(40, 6, 1), (40, 20, 3), (5, 12, 2), (60, 30, 30)])
def test_leading_directions_are_those_of_an_svd(rows: int, hidden: int, rank: int) -> None:
    matrix = np.random.default_rng(rows).standard_normal((rows, hidden)) * np.geomspace(1, 30, hidden)
    matrix = matrix.astype(np.float32)
    _, expected_K, right_KH = np.linalg.svd(matrix, full_matrices=False)
    found_HK, sigma_K = leading_directions(matrix, rank)
    assert found_HK.shape == (hidden, rank)
    np.testing.assert_allclose(found_HK @ found_HK.T, right_KH[:rank].T @ right_KH[:rank], atol=1e-3)
    np.testing.assert_allclose(sigma_K, expected_K[:rank], rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 3])
def test_projection_gates_are_signed_leading_directions(rank: int, tmp_path: Path) -> None:
    models = tiny.make_models(tmp_path, dtype="F32")
    router = {"kind": "projection", "rank": rank, "temperature": 0.5, "sign": "mean"}
    moerge.merge(tiny.write_recipe(tmp_path, moe={"router": router}, merge={"method": "ties"}), tmp_path / "moe")
    base = tiny.read_values(models["base"])
    embedding = base["model.embed_tokens.weight"].astype(np.float64)
    mean = (embedding / np.sqrt(np.square(embedding).mean(axis=1, keepdims=True))).mean(axis=0)
    gates = tiny.read_values(tmp_path / "moe")
    for layer in range(2):
        gate = gates[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        typical = mean * base[f"model.layers.{layer}.post_attention_layernorm.weight"]
        np.testing.assert_array_equal(gate[0], 0)
        for row, expert in enumerate(tiny.EXPERTS, 1):
            values = tiny.read_values(models[expert])
            names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up")]
            tau = np.concatenate([values[name].astype(np.float64) - base[name] for name in names])
            _, sigma, right = np.linalg.svd(tau)
            signs = np.sign(right[:rank] @ typical)
            expected = (signs * sigma[:rank]) @ right[:rank]
            np.testing.assert_allclose(gate[row], 2 * expected / np.linalg.norm(expected), atol=2e-3)
    assert moerge.verify(tmp_path / "moe").problems == ()


def test_projection_needs_a_base_and_a_rank_that_fits(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    wanted = {"moe": {"router": {"kind": "projection"}}, "merge": {"method": "average"}}
    with pytest.raises(InputError, match="the projection router works on task vectors, so the recipe needs a 'base'"):
        moerge.plan(tiny.write_recipe(tmp_path, base=None, **wanted))
    wide = tiny.write_recipe(tmp_path, moe={"router": {**MEAN, "rank": 17}})
    with pytest.raises(InputError, match=r"moe\.router\.rank is 17, but the model is only 16 wide"):
        moerge.merge(wide, tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_an_expert_that_equals_the_base_gets_a_zero_row(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    recipe = tiny.write_recipe(tmp_path, experts={"math": "math", "copy": "base"}, moe={"router": MEAN})
    moerge.merge(recipe, tmp_path / "moe")
    gate = tiny.read_values(tmp_path / "moe")["model.layers.0.block_sparse_moe.gate.weight"]
    assert [bool(row.any()) for row in gate] == [False, True, False]


def test_recipe_errors_about_calibration_name_the_entry(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    (tmp_path / "a.txt").write_text("w3 w4")
    texts = dict.fromkeys(("base", *tiny.EXPERTS), "a.txt")
    ridge_moe = {"router": {"kind": "ridge"}}
    without_code = {name: file for name, file in texts.items() if name != "code"}
    for sections, message in (
        ({"calibration": {"maths": "a.txt"}}, r"line \d+: calibration\.maths is not a model of this recipe, did you mean 'math'"),
        ({"moe": ridge_moe, "calibration": without_code}, "the ridge router needs text for every expert: add 'code: FILE' to 'c"),
        ({"moe": ridge_moe}, "the ridge router needs text for every expert: add 'base: FILE' to 'calibration'"),
        ({"moe": ridge_moe, "calibration": {**texts, "code": "b.txt"}}, r"calibration\.code: there is no file or folder"),
        ({"moe": {"router": {"kind": "ridge", "penalti": 1.0}}}, "penalti: unknown key, did you mean 'penalty'"),
        ({"moe": {"router": {"kind": "rigde"}}}, "unknown router kind 'rigde': did you mean 'ridge'"),
        ({"moe": {"router": {"kind": "ridge", "path": "both"}}}, "moe.router.path should be 'own' or 'uniform', not 'both'"),
        ({"calibration": ["a.txt"]}, "calibration should be a mapping"),
    ):
        with pytest.raises(InputError, match=message):
            moerge.plan(tiny.write_recipe(tmp_path, **sections))


def test_plan_says_what_calibration_costs_and_what_is_odd_about_it(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    (tmp_path / "a.txt").write_text("w3 w4\n\nw5 w6")
    (tmp_path / "b.txt").write_text("w7\n\nW5  w6\n\nw8")
    texts = {"base": "a.txt", "math": "b.txt", "code": "a.txt", "knowledge": "b.txt"}
    planned = moerge.plan(tiny.write_recipe(tmp_path, moe={"router": {"kind": "ridge"}}, calibration=texts))
    assert planned.warnings == ("4 calibration texts belong to several experts (base, code, knowledge, math)",)
    assert "with the whole merged model in memory" in planned.notes[-1]
    assert planned.notes[-1].endswith("GB with torch itself, from 10 texts")
    assert planned.memory_bytes(1) > planned.output_bytes
    summary = planned.summary(1)
    assert summary["calibration"] == {"base": 2, "math": 3, "code": 2, "knowledge": 3}
    assert summary["operations"]["fit"] == 2
    unused = moerge.plan(tiny.write_recipe(tmp_path, calibration=texts))
    assert unused.warnings == ("'calibration' is not used: nothing in this recipe is fitted to text",)


def test_seed_is_set_only_for_routers_that_have_one(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    load_recipe(tiny.write_recipe(tmp_path, moe={"router": {"kind": "projection"}}), seed=7)
    drawn = load_recipe(tiny.write_recipe(tmp_path, moe={}), seed=7)
    assert drawn.moe is not None and drawn.moe.router.model_dump() == {"seed": 7, "std": None}
    ridge_moe = {"router": {"kind": "ridge"}}
    load_recipe(tiny.write_recipe(tmp_path, moe=ridge_moe, calibration={"math": "a.txt"}), seed=7)


def test_every_router_says_what_it_does() -> None:
    assert routers() == ["embedding", "hidden", "keep", "perplexity", "projection", "random", "ridge"]
    for name in routers():
        kind = router(name)
        assert kind.kind == name and kind.__doc__
