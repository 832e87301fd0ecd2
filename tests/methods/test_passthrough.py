"""Passthrough copies one model's tensors; overrides may have weights of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from tests.helpers import tiny
from tests.helpers.command import refuses
from tests.helpers.reference import task_arithmetic

LAYER = "model.layers.{}.{}.weight"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    tiny.make_models(tmp_path)
    return tmp_path


def test_tensors_of_one_model_are_copied(models: Path) -> None:
    overrides = [{"match": "embedding", "method": "passthrough", "model": "code"}, {"match": "norm", "method": "passthrough"}]
    recipe = tiny.write_recipe(models, merge={"method": "ties", "overrides": overrides})
    plan = moerge.plan(recipe)
    assert plan.summary(1)["operations"] == {"copy": 6, "ties": 15}
    made = tiny.read_tensors(moerge.merge(plan, models / "out", threads=1).folder)
    code, base = tiny.read_tensors(models / "code"), tiny.read_tensors(models / "base")
    assert (made["model.embed_tokens.weight"] == code["model.embed_tokens.weight"]).all()
    assert (made["model.norm.weight"] == base["model.norm.weight"]).all()
    assert (made["lm_head.weight"] != base["lm_head.weight"]).any()


def test_other_element_types_are_converted(models: Path) -> None:
    recipe = tiny.write_recipe(models, merge={"method": "passthrough", "model": "math"}, dtype="float32")
    made = tiny.read_values(moerge.merge(recipe, models / "out", threads=1).folder)
    math = tiny.read_values(models / "math")
    assert made.keys() == math.keys()
    assert all((made[name] == math[name]).all() for name in math)


def test_the_backbone_of_a_moe_can_be_one_models_alone(models: Path) -> None:
    recipe = tiny.write_recipe(models, merge={"method": "passthrough", "model": "math"}, moe={})
    made, math = (tiny.read_tensors(f) for f in (moerge.merge(recipe, models / "out", threads=1).folder, models / "math"))
    shared = [name for name in math if ".mlp." not in name]
    assert len(shared) == 15 and all((made[name] == math[name]).all() for name in shared)


def test_an_override_replaces_the_weights_that_it_names(models: Path) -> None:
    overrides = [{"match": "ffn", "weights": {"code": -0.5}}]
    merge = {"method": "task_arithmetic", "scale": 1.0, "overrides": overrides}
    experts = {"math": {"model": "math", "weight": 0.25}, "code": "code"}
    recipe = tiny.write_recipe(models, experts=experts, merge=merge, dtype="float32")
    made = tiny.read_values(moerge.merge(recipe, models / "out", threads=1).folder)
    base, *both = (tiny.read_values(models / name) for name in ("base", "math", "code"))
    for name, weights in ((LAYER.format(1, "mlp.up_proj"), [0.25, -0.5]), (LAYER.format(1, "self_attn.q_proj"), [0.25, 1.0])):
        theta_EN = np.stack([expert[name].reshape(-1) for expert in both])
        expected = task_arithmetic(base[name].reshape(-1), theta_EN, weights, scale=1.0)
        np.testing.assert_array_equal(made[name].reshape(-1), expected)


@pytest.mark.parametrize(
    ("merge", "message"),
    [
        ({"method": "passthrough", "model": "maths"}, "merge.model: 'maths' is not a model of this recipe, did you mean 'math'?"),
        (
            {"overrides": [{"match": "norm", "method": "passthrough", "model": "x"}]},
            "merge.overrides[0].model: 'x' is not a model of this recipe, known: base, code, knowledge, math",
        ),
        (
            {"method": "linear", "overrides": [{"match": "norm", "weights": {"base": 1}}]},
            "merge.overrides[0].weights.base is not an expert, known: code, knowledge, math",
        ),
        (
            {"overrides": [{"match": "norm", "weights": {"math": 2}}]},
            "merge.overrides[0].weights have no effect on average, which ignores them",
        ),
        (
            {"method": "linear", "overrides": [{"match": "norm", "weights": {"math": "x"}}]},
            "merge.overrides[0].weights.math should be a number, not 'x'",
        ),
        (
            {"method": "linear", "overrides": [{"match": "norm", "weights": {"math": -2}}]},
            "tensor 'model.layers.0.input_layernorm.weight': the weights sum to zero: they cannot be normalized",
        ),
    ],
)
def test_what_is_refused(merge: dict[str, Any], message: str, models: Path) -> None:
    refuses(tiny.write_recipe(models, merge=merge), models / "out", message)


def test_outside_of_a_recipe_there_is_no_model_to_name() -> None:
    values = {"a": np.ones(4, np.float32)}
    with pytest.raises(moerge.InputError, match="passthrough takes tensors from one model of a recipe"):
        moerge.merge_state_dicts(values, [values], method="passthrough")
