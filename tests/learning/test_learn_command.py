"""`moerge learn` from end to end, and merging with what it wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from moerge.learning.run import with_coefficients
from moerge.merging.pipeline import merge as run_merge
from moerge.merging.state_dicts import merge_state_dicts
from moerge.planning.build import build_plan
from moerge.recipe.coefficients import Coefficients, read_coefficients
from tests.helpers.command import moerge, start
from tests.helpers.tiny import make_models, read_tensors, read_values
from tests.learning.learn_models import make_recipe, slots_of

pytestmark = pytest.mark.slow

LEARN = {"gamma": 0.0, "heldout": 0.0, "learning_rate": 1.0}


def write(folder: Path, **changes: Any) -> Path:
    recipe = make_recipe(folder, learn={**LEARN, **changes.pop("learn", {})}, **changes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.written, sort_keys=False))
    return path


def test_the_checkpoint_is_what_its_own_coefficients_say(tmp_path: Path) -> None:
    recipe = write(tmp_path, learn={"extra": 0.5})
    done = moerge("learn", recipe, tmp_path / "out", "--json").json
    found = read_coefficients(tmp_path / "out" / "coefficients.json")
    assert done["mean_coefficients"] == found.means()
    assert sum(len(rows[0]) for rows in found.by_tensor.values()) == 21
    base, merged = read_values(tmp_path / "base"), read_values(tmp_path / "out")
    experts = [read_values(tmp_path / name) for name in found.experts]
    for name, theta in merged.items():
        rows = found.by_tensor.get(name, ((found.fixed,),) * 3)
        chunks = [torch.from_numpy((expert[name] - base[name]).ravel()).chunk(len(rows[0])) for expert in experts]
        parts = [sum(row[i] * tau[i] for row, tau in zip(rows, chunks, strict=True)) for i in range(len(rows[0]))]
        expected = base[name] + torch.cat(parts).numpy().reshape(theta.shape)
        np.testing.assert_allclose(theta, expected, rtol=0, atol=1e-6, err_msg=name)
    assert moerge("verify", tmp_path / "out").code == 0
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "out.coefficients.json").exists()


def test_the_coefficients_merge_again_to_the_same_bytes_without_torch(tmp_path: Path) -> None:
    recipe = write(tmp_path, merge={"method": "ties", "density": 0.5, "scale": 0.4})
    moerge("learn", recipe, tmp_path / "out", "--quiet")
    written = yaml.safe_load(recipe.read_text())
    written["merge"] = {"method": "coefficients", "file": "out/coefficients.json"}
    del written["learn"], written["calibration"]
    recipe.write_text(yaml.safe_dump(written, sort_keys=False))
    env = {**os.environ, "PYTHONPATH": str(_without_torch(tmp_path))}
    process = start("merge", recipe, tmp_path / "again", "--quiet", env=env)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    first, second = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert all((first[name] == second[name]).all() for name in first | second)
    assert (tmp_path / "again" / "coefficients.json").read_bytes() == (tmp_path / "out" / "coefficients.json").read_bytes()


def fails(*arguments: object) -> str:
    result = moerge(*arguments)
    assert (result.code, result.out) == (2, ""), result
    return result.err


def _without_torch(folder: Path) -> Path:
    (folder / "none" / "torch").mkdir(parents=True)
    (folder / "none" / "torch" / "__init__.py").write_text("raise ImportError('torch was imported')")
    return folder / "none"


def test_what_a_moe_keeps_separate_runs_through_its_own_expert_and_does_not_learn(tmp_path: Path) -> None:
    recipe = write(tmp_path, moe={"include_base": False, "top_k": 1, "router": {"kind": "random"}})
    moerge("learn", recipe, tmp_path / "out", "--quiet")
    found = read_coefficients(tmp_path / "out" / "coefficients.json")
    assert found.by_tensor and all("self_attn" in name for name in found.by_tensor)
    merged, code = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "code")
    up = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    assert (merged[up] == code["model.layers.1.mlp.up_proj.weight"]).all()


DIRECTIONS = [
    {"method": "ties", "density": 0.5},
    {"method": "ties", "density": 0.5, "scope": "model"},
    {"method": "ties", "density": {"knowledge": 0.8, "math": 0.2, "code": 0.5}},
    {"method": "dare", "density": 0.5, "seed": 7},
    {"method": "della", "density": 0.5, "aggregate": "sum"},
    {"method": "breadcrumbs", "density": 0.5, "gamma": 0.1},
    {"method": "breadcrumbs", "density": 0.5, "gamma": 0.1, "scope": "row"},
]


def name_of(merge: dict[str, Any]) -> str:
    return " ".join(str(value) for value in merge.values())


@pytest.mark.parametrize("merge", DIRECTIONS, ids=name_of)
def test_untouched_coefficients_are_the_merge_itself(tmp_path: Path, merge: dict[str, Any]) -> None:
    recipe = write(tmp_path, merge={**merge, "scale": 0.3}, learn={"gamma": float("inf")})
    assert moerge("learn", recipe, tmp_path / "out", "--quiet").code == 0
    assert read_coefficients(tmp_path / "out" / "coefficients.json").learning["settings"]["gamma"] == ".inf"
    tensors = {name: read_values(tmp_path / name) for name in ("base", "math", "code", "knowledge")}
    base = tensors.pop("base")
    expected = merge_state_dicts(base, tensors, scale=0.3, **merge)
    for name, theta in read_values(tmp_path / "out").items():
        np.testing.assert_allclose(theta, expected[name], rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("merge", [DIRECTIONS[1], {"method": "breadcrumbs", "density": 0.5, "scope": "model"}], ids=name_of)
def test_a_threshold_of_the_model_spans_the_backbone_of_a_moe_alone(tmp_path: Path, merge: dict[str, Any]) -> None:
    moe = {"include_base": False, "top_k": 1, "router": {"kind": "random"}}
    recipe = write(tmp_path, merge={**merge, "scale": 0.3}, moe=moe, learn={"gamma": float("inf")})
    assert moerge("learn", recipe, tmp_path / "out", "--quiet").code == 0
    written = yaml.safe_load(recipe.read_text())
    del written["learn"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    assert moerge("merge", tmp_path / "plain.yaml", tmp_path / "plain", "--quiet").code == 0
    learned, plain = read_values(tmp_path / "out"), read_values(tmp_path / "plain")
    for name, theta in plain.items():
        np.testing.assert_allclose(learned[name], theta, rtol=0, atol=2e-7, err_msg=name)


@pytest.mark.parametrize("merge", DIRECTIONS, ids=name_of)
@pytest.mark.parametrize("moe", [False, True], ids=["dense", "backbone"])
def test_what_learns_is_what_is_merged_afterwards(tmp_path: Path, merge: dict[str, Any], moe: bool) -> None:
    sections: dict[str, Any] = {"moe": {"include_base": False, "top_k": 1, "router": {"kind": "random"}}} if moe else {}
    recipe = make_recipe(tmp_path, merge={**merge, "scale": 0.3}, learn={}, **sections)
    rows = {slot.name: ((0.2,), (0.3,), (0.4,)) for slot in slots_of(recipe)}
    found = Coefficients(tuple(recipe.experts), rows, {}, 0.3, {"method": recipe.method.name, **recipe.method.model_dump()})
    run_merge(build_plan(with_coefficients(recipe, found)), tmp_path / "out")
    merged, base = read_values(tmp_path / "out"), read_values(tmp_path / "base")
    compared = 0
    for slot in slots_of(recipe):
        if slot.directions is not None and not slot.routed:
            tau_N = np.array([0.2, 0.3, 0.4], np.float32) @ slot.directions.read()
            expected = base[slot.name] + tau_N.reshape(base[slot.name].shape)
            np.testing.assert_allclose(merged[slot.name], expected, rtol=0, atol=2e-7, err_msg=slot.name)
            compared += 1
    assert compared == (15 if moe else 21)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"merge": {"method": "average"}},
            "merge.method: learned coefficients weigh task vectors: use task_arithmetic, ties or dare",
        ),
        (
            {"merge": {"method": "task_arithmetic", "scale": 1.0}},
            "merge.scale is where coefficients start, so it must lie between 0 and 1",
        ),
        ({"merge": {"method": "ties", "scale": 0.3, "aggregate": "mean"}}, "merge.aggregate is 'mean', which is no sum"),
        ({"learn": {"hidden_layers": [3]}}, "learn.hidden_layers: there is no layer 3, the model has 2"),
        ({"learn": {"roles": ["norm"]}}, "no matrix has a role of learn.roles (norm): nothing to learn"),
        ({"calibration": {"math": "math.jsonl"}}, "learning needs text for every expert: add 'code: FILE' to 'calibration'"),
        ({"learn": {"gama": 1}}, "learn.gama: unknown key, did you mean 'gamma'?"),
        (
            {"learn": {"task_weights": {"maths": 1.0}}},
            "learn.task_weights.maths is not a model of this recipe, did you mean 'math'?",
        ),
    ],
)
def test_bad_recipes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    recipe = make_recipe(tmp_path).written | {"learn": LEARN}
    for key, value in changes.items():
        recipe[key] = {**LEARN, **value} if key == "learn" else value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert message in fails("learn", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_coefficients_of_other_experts_are_refused(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype="F32")
    recipe = write(tmp_path, models=models, experts=["math", "code"])
    moerge("learn", recipe, tmp_path / "out", "--quiet")
    written = yaml.safe_load(recipe.read_text())
    written["merge"] = {"method": "coefficients", "file": "out/coefficients.json"}
    del written["learn"]
    written["experts"] = {name: str(models[name]) for name in ("code", "math")}
    recipe.write_text(yaml.safe_dump(written, sort_keys=False))
    assert "was learned for the experts math, code, but the recipe has code, math" in fails("merge", recipe, tmp_path / "again")
    written["merge"]["file"] = "out/config.json"
    recipe.write_text(yaml.safe_dump(written, sort_keys=False))
    assert "config.json is damaged, or was written by another version of moerge" in fails("plan", recipe)


def test_an_expert_that_changes_while_it_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, source = write(tmp_path), next(tmp_path.glob("*/model.safetensors"))
    written = Coefficients.write
    monkeypatch.setattr(Coefficients, "write", lambda self, path: (os.utime(source), written(self, path))[1])
    result = moerge("learn", recipe, tmp_path / "out", "--quiet")
    assert result.code == 1 and str(source) in result.err
    assert not (tmp_path / "out").exists()
