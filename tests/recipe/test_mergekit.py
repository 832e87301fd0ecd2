"""mergekit's files: filters, gradients, scopes and slices give what mergekit's documentation says, by a slow reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import moerge
from moerge.planning.equivalent import equivalent_recipe
from moerge.recipe import load_recipe
from moerge.recipe.document import Document
from moerge.recipe.mergekit.parameters import read_setting
from tests.helpers import adapters, mergekit_reference, tiny
from tests.helpers.command import moerge as command

LAYERS = 4
SLERP = """
slices:
  - sources:
      - {model: math, layer_range: [0, 4]}
      - {model: code, layer_range: [0, 4]}
merge_method: slerp
base_model: math
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - {value: 0.5}
"""
TIES = """
models:
  - {model: base}
  - {model: math, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - model: code
    parameters:
      density: 0.33
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
  - {model: knowledge, parameters: {weight: [{filter: "*", value: [0.25, 2]}], density: "5e-1"}}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true, lambda: [{filter: norm, value: 0.25}, {value: [1.5, 0.5]}]}
"""
SCOPES = """
slices:
  - sources:
      - {model: math, layer_range: [1, 3], parameters: {weight: [{filter: q_proj, value: 3}, {filter: layers.2.mlp, value: 7}]}}
      - {model: base, layer_range: [0, 2]}
    parameters: {weight: [{filter: self_attn, value: 2}], lambda: 0.1}
  - sources:
      - {model: code, layer_range: [3, 4]}
      - {model: knowledge, layer_range: [0, 1], parameters: {weight: [0.5, 0.25]}}
      - {model: base, layer_range: [3, 4]}
merge_method: task_arithmetic
base_model: base
parameters: {weight: 1, normalize: [true, true, false]}
"""
LINEAR = """
models:
  - {model: math, parameters: {weight: 2}}
  - {model: code, parameters: {weight: [{filter: lm_head, value: 0.1}, {value: [-0.2, 1]}]}}
  - {model: base, parameters: {weight: 0.5}}
merge_method: linear
parameters: {normalize: [{filter: norm, value: true}, {value: false}]}
"""
FRANKENMERGE = """
slices:
  - sources: [{model: math, layer_range: [0, 3]}]
  - sources:
      - model: code
        layer_range: [1, 4]
        parameters: {scale: [{filter: o_proj, value: 0.0}, {filter: down_proj, value: [0.5, 1]}, {value: 1.0}]}
  - sources: [{model: math, layer_range: [2, 4]}]
merge_method: passthrough
"""
TWO_BASES = """
slices:
  - sources: [{model: math, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]
  - sources: [{model: math, layer_range: [2, 4]}, {model: code, layer_range: [2, 4]}]
    base_model: code
merge_method: task_arithmetic
base_model: base
parameters: {weight: 0.5}
"""
FILES = {
    "slerp": SLERP,
    "slerp of models": "models: [{model: code}]\nbase_model: math\nmerge_method: slerp\nparameters: {t: 0.25}\n",
    "ties": TIES,
    "scopes": SCOPES,
    "linear": LINEAR,
    "passthrough": FRANKENMERGE,
    "two bases": TWO_BASES,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mergekit")
    tiny.make_models(folder, config={"num_hidden_layers": LAYERS}, dtype="F32")
    return folder


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """mergekit's relative paths start from the working directory."""
    monkeypatch.chdir(models)
    return models


@pytest.mark.parametrize("name", FILES)
def test_tensors_are_what_the_documentation_says(name: str, here: Path, tmp_path: Path) -> None:
    file = tmp_path / "mergekit.yml"
    file.write_text(FILES[name] + "dtype: float32\n")
    out = moerge.merge(file, tmp_path / "out", threads=1).folder
    actual, expected = tiny.read_values(out), mergekit_reference.merged(file, here)
    assert actual.keys() == expected.keys()
    for tensor, values in expected.items():
        np.testing.assert_allclose(actual[tensor], values, rtol=2e-6, atol=2e-7, err_msg=tensor)
    assert moerge.verify(out, threads=1).problems == ()


def test_the_reference_tells_settings_apart(here: Path, tmp_path: Path) -> None:
    """What the test above relies on: each setting changes something."""
    for text, changes in (
        (TIES, [("[1, 0.7, 0.1]", "1"), ("filter: mlp", "filter: norm"), ("[0.25, 2]", "[2, 0.25]"), ("1.5, 0.5", "0.5, 1.5")]),
        (SCOPES, [("layers.2.mlp", "layers.1.mlp"), ("[1, 3]", "[2, 4]"), ("lambda: 0.1", "lambda: 1"), ("[0.5, 0.25]", "0.5")]),
    ):
        file = tmp_path / "file.yml"
        file.write_text(text)
        before = mergekit_reference.merged(file, here)
        for old, new in changes:
            file.write_text(text.replace(old, new, 1))
            after = mergekit_reference.merged(file, here)
            assert any((before[name] != after[name]).any() for name in before), (old, new)


@pytest.mark.parametrize(
    ("written", "name", "depth", "expected"),
    [
        (0.5, "any", 0.3, 0.5),
        ([0, 1], "any", 0.25, 0.25),
        ([0, 10, 40], "any", 0.75, 25.0),
        ([7], "any", 0.6, 7.0),
        ([0, 1], "any", 1.0, 1.0),
        ([], "any", 0.5, None),
        ({"value": 3}, "any", 0.0, 3.0),
        ({"filter": "mlp", "value": 3}, "a.mlp.b", 0.0, 3.0),
        ({"filter": "mlp", "value": 3}, "a.attn.b", 0.0, None),
        ([{"filter": "a", "value": 1}, {"filter": "b", "value": 2}], "a.b", 0.0, 1.0),
        ([{"filter": "*", "value": [1, 2]}, {"value": 9}], "a.b", 1.0, 2.0),
        ([{"filter": "c", "value": 1}, {"value": 9}], "a.b", 1.0, 9.0),
        ("1e-3", "any", 0.0, 0.001),
        (True, "any", 0.0, 1.0),
    ],
)
def test_a_setting(written: Any, name: str, depth: float, expected: float | None) -> None:
    setting = read_setting(Document({}), ("parameters", "weight"), written, "number")
    assert setting.at(name, depth) == expected
    assert mergekit_reference.evaluated(1e-3 if written == "1e-3" else written, name, depth) == expected


def test_truths_step_where_numbers_glide() -> None:
    setting = read_setting(Document({}), ("normalize",), [True, False, True], "truth")
    assert [setting.at("any", depth) for depth in (0.0, 0.4, 0.5, 0.9, 1.0)] == [True, True, False, False, True]


def test_depth_of_a_frankenmerge(here: Path, tmp_path: Path) -> None:
    config = {"layer_types": ["a", "b", "c", "d"]}
    tiny.make_models(tmp_path, config={"num_hidden_layers": 4, **config})
    plan = moerge.plan(
        yaml.safe_load(FRANKENMERGE.replace("math", str(tmp_path / "math")).replace("code", str(tmp_path / "code")))
    )
    assert plan.config["num_hidden_layers"] == 8
    assert plan.config["layer_types"] == ["a", "b", "c", "b", "c", "d", "c", "d"]
    sources = {output.name: output.operation.sources[0].label for output in plan.outputs}
    assert sources["model.embed_tokens.weight"] == "math:model.embed_tokens.weight"
    assert sources["model.layers.2.mlp.up_proj.weight"] == "math:model.layers.2.mlp.up_proj.weight"
    assert sources["model.layers.3.mlp.up_proj.weight"] == "code:model.layers.1.mlp.up_proj.weight"
    assert sources["model.layers.6.mlp.up_proj.weight"] == "math:model.layers.2.mlp.up_proj.weight"
    assert sources["lm_head.weight"] == "math:lm_head.weight"
    assert plan.notes[0] == "a mergekit file: passthrough of math, code, 8 layers from 3 slices"


def test_slices_of_models_with_other_numbers_of_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.make_models(tmp_path / "deep", experts=["math"], base=False, config={"num_hidden_layers": 5})
    tiny.make_models(tmp_path / "flat", experts=["code"], base=False, config={"num_hidden_layers": 3})
    sources = [[{"model": "flat/code", "layer_range": [0, 3]}], [{"model": "deep/math", "layer_range": [3, 5]}]]
    recipe = {"merge_method": "passthrough", "slices": [{"sources": part} for part in sources]}
    out = moerge.merge(recipe, "out", threads=1).folder
    made, deep, flat = (tiny.read_tensors(folder) for folder in (out, Path("deep/math"), Path("flat/code")))
    assert len(made) == 3 + 9 * 5
    assert (made["model.layers.2.mlp.up_proj.weight"] == flat["model.layers.2.mlp.up_proj.weight"]).all()
    assert (made["model.layers.4.mlp.up_proj.weight"] == deep["model.layers.4.mlp.up_proj.weight"]).all()
    assert (made["lm_head.weight"] == deep["lm_head.weight"]).all()


def test_names_come_from_paths(tmp_path: Path) -> None:
    paths = ["org/Model.One@main", "other/Model.One", "./runs/final/", "/data/base", "a/-x", "b/ü b"]
    models = [{"model": path, "parameters": {"weight": 1}} for path in paths]
    recipe = load_recipe({"merge_method": "linear", "models": models})
    assert {name: expert.model for name, expert in recipe.experts.items()} == dict(
        zip(["Model.One", "Model.One_2", "final", "base_2", "x", "__b"], paths, strict=True)
    )
    assert (recipe.base, recipe.config, recipe.folder) == (None, "Model.One", Path())


def test_where_the_config_and_tokenizer_come_from() -> None:
    models = [{"model": "a/math", "parameters": {"weight": 1}}, {"model": "a/code", "parameters": {"weight": 1}}]
    plain = {"models": models, "merge_method": "task_arithmetic", "base_model": "a/base"}
    expected = {"base": "base", "union": "union", "a/code": "code", "a/base": "base"}
    for written, meant in expected.items():
        assert load_recipe({**plain, "tokenizer_source": written}).tokenizer == meant
        assert load_recipe({**plain, "tokenizer": {"source": written}}).tokenizer == meant
        name = meant if written == "a/code" else written
        assert load_recipe({**plain, "tokenizer": name}).tokenizer == meant
    assert load_recipe(plain).tokenizer is None
    assert load_recipe({**plain, "tokenizer": {}}).tokenizer == "union"
    linear = load_recipe({**plain, "merge_method": "linear", "base_model": "a/code", "tokenizer_source": "base"})
    assert (linear.base, linear.config, linear.tokenizer, list(linear.experts)) == (None, "code", "code", ["math", "code"])


def test_dtypes() -> None:
    plain = {"models": [{"model": "a"}], "merge_method": "passthrough"}
    for given, meant in (
        ({}, None),
        ({"dtype": "float16"}, "float16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, "float32"),
    ):
        assert load_recipe({**plain, **given}).dtype == meant


def test_adapters_are_experts_on_the_base() -> None:
    models = [{"model": "org/base+org/lora", "parameters": {"weight": 1}}, {"model": "org/full", "parameters": {"weight": 1}}]
    recipe = load_recipe({"models": models, "merge_method": "ties", "base_model": "org/base"})
    assert (recipe.base, recipe.config) == ("org/base", "base")
    assert {name: expert.model for name, expert in recipe.experts.items()} == {"lora": "org/lora", "full": "org/full"}


def test_an_adapter_is_merged_like_the_model_that_it_makes(here: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    factors = adapters.low_rank(name, (24, 16), rank=2)
    lora = adapters.write_adapter(tmp_path / "lora", factors, r=2, lora_alpha=4)
    models = [{"model": f"base+{lora}", "parameters": {"weight": 0.5}}]
    recipe = {"models": models, "merge_method": "task_arithmetic", "base_model": "base", "dtype": "float32"}
    made = tiny.read_values(moerge.merge(recipe, tmp_path / "out", threads=1).folder)
    base = tiny.read_values(here / "base")
    a, b = factors[f"{name}.lora_A.weight"], factors[f"{name}.lora_B.weight"]
    changed = base.pop(f"{name}.weight")
    np.testing.assert_allclose(made.pop(f"{name}.weight"), changed + 0.5 * 2 * (b @ a), atol=1e-6)
    assert all((made[other] == base[other]).all() for other in base)


def test_adapters_lie_on_any_model() -> None:
    """With no base, on another model than the base, and on the base itself."""
    pair = [{"model": f"org/{name}+org/lora-{name}", "parameters": {"weight": 1}} for name in ("x", "y")]
    recipe = load_recipe({"models": pair, "merge_method": "linear"})
    assert recipe.base is None
    assert {n: (e.model, e.adapter) for n, e in recipe.experts.items()} == {
        "lora-x": ("org/x", "org/lora-x"),
        "lora-y": ("org/y", "org/lora-y"),
    }
    recipe = load_recipe({"models": pair, "merge_method": "ties", "base_model": "org/x"})
    assert {n: (e.model, e.adapter) for n, e in recipe.experts.items()} == {
        "lora-x": ("org/lora-x", None),
        "lora-y": ("org/y", "org/lora-y"),
    }
    recipe = load_recipe({"models": pair, "merge_method": "ties", "base_model": "org/base+org/lora"})
    assert (recipe.base, recipe.base_adapter) == ("org/base", "org/lora")


def test_adapters_on_any_model_are_merged(here: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    factors = adapters.low_rank(name, (24, 16), rank=2)
    lora = str(adapters.write_adapter(tmp_path / "lo+ra", factors, r=2, lora_alpha=4))
    delta = 2 * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    models = [{"model": {"model": {"path": "math"}, "lora": {"path": lora}}}, {"model": "code"}]
    recipe = {"models": models, "merge_method": "task_arithmetic", "base_model": f"base+{lora}", "parameters": {"weight": 0.5}}
    made = tiny.read_values(moerge.merge({**recipe, "dtype": "float32"}, tmp_path / "out", threads=1).folder)
    base, math, code = (tiny.read_values(here / model)[f"{name}.weight"] for model in ("base", "math", "code"))
    base, math = base + delta, math + delta
    np.testing.assert_allclose(made[f"{name}.weight"], base + 0.5 * (math - base) + 0.5 * (code - base), atol=1e-6)


def test_a_path_with_a_plus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.make_models(tmp_path / "a+b")
    recipe = {"models": [{"model": "a+b/math"}, {"model": "a+b/code"}], "merge_method": "karcher"}
    assert [expert.model for expert in load_recipe(recipe).experts.values()] == ["a+b/math", "a+b/code"]
    moerge.plan(recipe)
    mapped = {"model": {"path": "a+b/math"}, "lora": {"path": "no+such"}}
    (expert,) = load_recipe({"models": [{"model": mapped}], "merge_method": "linear"}).experts.values()
    assert (expert.model, expert.adapter) == ("a+b/math", "no+such")


MULTI = """\
name: first
merge_method: ties
models: [{model: math, parameters: {weight: 1, density: 0.5}}, {model: code, parameters: {weight: 0.5}}]
base_model: base
---
merge_method: slerp
models: [{model: second}, {model: first}]
base_model: second
parameters: {t: 0.25}
---
name: second
merge_method: task_arithmetic
models: [{model: first, parameters: {weight: -0.5}}]
base_model: math
dtype: float32
"""


def test_documents_are_models_of_each_other(here: Path, tmp_path: Path) -> None:
    """mergekit-multi: the same as a merge for each, in order."""
    (tmp_path / "multi.yml").write_text(MULTI)
    made = tiny.read_tensors(moerge.merge(tmp_path / "multi.yml", tmp_path / "out").folder)
    first, last, second = MULTI.replace("name: first\n", "").replace("name: second\n", "").split("---\n")
    for name, text in (("first", first), ("second", second), ("steps", last)):
        for known in ("first", "second"):
            text = text.replace(f"model: {known}", f"model: {tmp_path / known}")
        (tmp_path / f"{name}.yml").write_text(text)
        moerge.merge(tmp_path / f"{name}.yml", tmp_path / name)
    expected = tiny.read_tensors(tmp_path / "steps")
    assert all(np.array_equal(made[name], expected[name]) for name in expected) and made.keys() == expected.keys()

    written = moerge.plan(tmp_path / "multi.yml").recipe.written
    assert moerge.plan(written).fingerprint == moerge.plan(tmp_path / "multi.yml").fingerprint
    again = equivalent_recipe(moerge.plan(tmp_path / "multi.yml"))
    moerge.merge(again, tmp_path / "again")
    theirs = tiny.read_tensors(tmp_path / "again")
    assert all(np.array_equal(theirs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: math,", "model: second,", r"documents\.second is one of its own models \(second -> first -> second\)"),
        ("name: second", "name: first", "line 11: the name 'first' is taken"),
        ("name: second\n", "", "line 11: two documents have no 'name'"),
        ("merge_method: slerp", "name: third\nmerge_method: slerp", "every document has a 'name'"),
        ("weight: -0.5", "weigth: -0.5", "line 13: .*weigth: unknown parameter"),
        ("merge_method: slerp", "x: slerp", "line 6: a second document starts here"),
    ],
)
def test_bad_documents_are_refused(old: str, new: str, message: str, here: Path, tmp_path: Path) -> None:
    (tmp_path / "multi.yml").write_text(MULTI.replace(old, new, 1))
    with pytest.raises(moerge.InputError, match=message):
        moerge.plan(tmp_path / "multi.yml")


def test_methods_and_their_settings(here: Path) -> None:
    models = [{"model": "math", "parameters": {"weight": 0.5, "density": 0.5}}, {"model": "code", "parameters": {"weight": 1}}]
    by_method = {
        "ties": "ties: scale 1, density",
        "task_arithmetic": "task_arithmetic: scale 1, normalize False, weights 0.5, 1",
        "linear": "linear: normalize True",
        "breadcrumbs": "breadcrumbs: scale 1",
        "breadcrumbs_ties": "breadcrumbs: scale 1",
        "dare_ties": "dare: scale 1",
        "dare_linear": "dare: scale 1",
        "della": "della: scale 1",
        "della_linear": "della: scale 1",
        "model_stock": "model_stock: filter_wise False",
        "sce": "sce: scale 1, select_topk 1",
    }
    for method, shown in by_method.items():
        base = {} if method == "linear" else {"base_model": "base"}
        output = moerge.plan({"merge_method": method, "models": models, **base}).outputs[0]
        assert f"{output.action}: {output.hyperparameters}".startswith(shown), f"{output.action}: {output.hyperparameters}"


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("dare_linear", {}, {"elect": "none", "aggregate": "sum", "rescale": True, "density": (0.5, 1.0)}),
        ("dare_ties", {"normalize": True, "rescale": False}, {"elect": "sign", "aggregate": "mean", "rescale": False}),
        ("breadcrumbs", {"gamma": 0.125}, {"elect": "none", "aggregate": "sum", "gamma": 0.125, "density": (0.5, 1.0)}),
        ("breadcrumbs_ties", {}, {"elect": "sign", "aggregate": "sum", "gamma": 0.01}),
        ("della", {}, {"elect": "sign", "aggregate": "mean", "epsilon": 0.15, "rescale": True}),
        ("della_linear", {"epsilon": 0.1}, {"elect": "none", "aggregate": "sum", "epsilon": 0.1}),
        ("ties", {"normalize": False, "lambda": 2}, {"aggregate": "sum", "scale": 2.0, "scope": "tensor"}),
        ("sce", {"select_topk": 0.25}, {"select_topk": 0.25, "scale": 1.0}),
        ("model_stock", {"filter_wise": True}, {"filter_wise": True}),
        ("nuslerp", {}, {"origin": "base", "vectors": "tensor"}),
        ("nuslerp", {"nuslerp_flatten": False}, {"vectors": "row"}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}, {"vectors": "column"}),
        ("nuslerp", {"nuslerp_row_wise": True}, {"vectors": "tensor"}),
        ("multislerp", {"normalize_weights": False, "eps": 1e-6}, {"origin": "base", "normalize": False}),
        ("ram", {"epsilon": 0.5}, {"epsilon": 0.5, "scale": 1.0}),
        ("ramplus_tl", {"r": 0.3, "alpha": 0.5}, {"r": 0.3, "alpha": 0.5, "epsilon": 1e-5, "scope": "tensor"}),
    ],
)
def test_parameters(method: str, parameters: dict[str, Any], expected: dict[str, Any], here: Path) -> None:
    models = [{"model": "math", "parameters": {"weight": 0.5, "density": 0.5}}, {"model": "code", "parameters": {"weight": 1}}]
    recipe = {"merge_method": method, "models": models, "base_model": "base", "parameters": parameters}
    made: Any = moerge.plan(recipe).outputs[0].operation
    settings = dict(made.method)
    assert {key: settings[key] for key in expected} == expected
    assert made.base.model == "base" and [source.model for source in made.experts] == ["math", "code"]


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("nuslerp", {"weight": 1}, {"origin": "zero"}),
        ("multislerp", {"weight": 1}, {"origin": "zero", "normalize": True}),
        ("karcher", {"max_iter": 3, "tol": 0.01}, {"origin": "zero", "max_iter": 3, "tol": 0.01}),
    ],
)
def test_methods_without_a_base(method: str, parameters: dict[str, Any], expected: dict[str, Any], here: Path) -> None:
    recipe = {"merge_method": method, "models": [{"model": "math"}, {"model": "code"}], "parameters": parameters}
    made: Any = moerge.plan(recipe).outputs[0].operation
    settings = dict(made.method)
    assert {key: settings[key] for key in expected} == expected
    assert made.base is None and [source.model for source in made.experts] == ["math", "code"]


def test_karchers_base_is_one_of_its_models(here: Path) -> None:
    made: Any = moerge.plan({"merge_method": "karcher", "models": [{"model": "math"}], "base_model": "base"}).outputs[0].operation
    assert made.base is None and [source.model for source in made.experts] == ["math", "base_2"]


@pytest.mark.parametrize(("method", "parameters"), [("nearswap", {"t": 0.25}), ("arcee_fusion", {})])
def test_methods_of_one_expert(method: str, parameters: dict[str, Any], here: Path) -> None:
    recipe = {"merge_method": method, "models": [{"model": "math"}], "base_model": "base", "parameters": parameters}
    made: Any = moerge.plan(recipe).outputs[0].operation
    assert made.base.model == "base" and [source.model for source in made.experts] == ["math"]
    assert {key: dict(made.method)[key] for key in parameters} == parameters


def test_nuslerps_weights_that_cancel_are_halves(here: Path) -> None:
    models = [{"model": "math", "parameters": {"weight": 1}}, {"model": "code", "parameters": {"weight": -1}}]
    made: Any = moerge.plan({"merge_method": "nuslerp", "models": models, "base_model": "base"}).outputs[0].operation
    assert made.weights == (1.0, 1.0)


def test_density_zero_leaves_a_model_out(here: Path) -> None:
    models = [{"model": "math", "parameters": {"weight": 0.5, "density": 0}}, {"model": "code", "parameters": {"weight": 2}}]
    made: Any = moerge.plan({"merge_method": "ties", "models": models, "base_model": "base"}).outputs[0].operation
    assert made.weights == (0.0, 2.0)


def test_seed(here: Path) -> None:
    models = [{"model": "math", "parameters": {"weight": 1, "density": 0.5}}]
    written = {"merge_method": "dare_ties", "models": models, "base_model": "base"}
    for recipe, seed, expected in ((written, None, 0), (written, 5, 5), ({**written, "random_seed": 3}, None, 3)):
        made: Any = moerge.plan(recipe, seed=seed).outputs[0].operation
        assert made.method.random_seed == expected
    assert load_recipe(written, seed=5).written["random_seed"] == 5


def test_warnings_say_where_results_differ(here: Path) -> None:
    def warnings(method: str, density: float, **more: Any) -> list[str]:
        models = [{"model": "math", "parameters": {"weight": 1, "density": density}}]
        recipe = load_recipe({"merge_method": method, "models": models, "base_model": "base", **more})
        return list(recipe.warnings)

    assert warnings("ties", 1) == warnings("dare_ties", 1) == warnings("task_arithmetic", 0.5) == []
    assert len(warnings("ties", 0.5)) == len(warnings("dare_linear", 0.5)) == len(warnings("della", [0.5, 1])) == 1
    assert warnings("breadcrumbs", 0.5)[0].startswith("differs from mergekit: breadcrumbs keeps ceil(density * n) entries")
    assert warnings("ties", 1, parameters={"t": 0.5}) == ["'t' has no effect on ties here, as in mergekit"]
    (told,) = warnings("ties", 1, chat_template="auto")
    assert told.startswith("differs from mergekit: 'chat_template: auto'")


@pytest.mark.parametrize("written", ["chatml", "{{ messages[0].content }}"])
def test_chat_templates(written: str, here: Path, tmp_path: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "math", "parameters": {"weight": 1}}], "chat_template": written}
    out = moerge.merge(recipe, tmp_path / "out").folder
    template = (out / "chat_template.jinja").read_text()
    assert template == written if "{" in written else "<|im_start|>assistant\\n" in template
    with pytest.raises(moerge.InputError, match="chat_template should be auto, chatml or a Jinja template itself, not 'llama3'"):
        load_recipe({**recipe, "chat_template": "llama3"})


def test_what_a_person_sees(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "mergekit.yml"
    file.write_text(TIES + "dtype: bfloat16\n")
    result = command("plan", file)
    shown = " ".join(result.out.split())
    assert "a mergekit file: ties of math, code, knowledge on base" in shown
    assert "mergekit computes in bfloat16, as 'dtype' says, and rounds at every step" in shown
    assert result.err == (
        "warning: differs from mergekit: ties keeps ceil(density * n) entries of a task vector and all that equal the smallest "
        "of them; mergekit keeps int(density * n) and chooses among equals by sort order\n"
    )


def test_the_card_and_manifest_have_the_file(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "mergekit.yml"
    file.write_text(TIES)
    out = moerge.merge(file, tmp_path / "out", threads=1).folder
    card = (out / "README.md").read_text()
    for part in (
        "merge_method: ties",
        "**ties** (scale = 1.5,",
        "others have others",
        "| math | `math` | local | see the recipe |",
    ):
        assert part in card, card
    assert moerge.inspect(out).manifest["recipe"] == yaml.safe_load(TIES)
    assert ", ties of base, math, code, knowledge" in command("inspect", out).out


@pytest.mark.parametrize("name", [name for name, text in FILES.items() if "slices" not in text] + ["slerp"])
def test_as_a_recipe_of_ours_it_says_the_same(name: str, here: Path, tmp_path: Path) -> None:
    file, ours = tmp_path / "mergekit.yml", tmp_path / "moerge.yaml"
    file.write_text(FILES[name])
    result = command("plan", file, "--as-recipe")
    assert result.code == 0 and "&" not in result.out
    ours.write_text(result.out)
    first, second = moerge.plan(file), moerge.plan(ours)
    described = [
        [(output.name, output.action, output.hyperparameters, output.dtype) for output in plan.outputs]
        for plan in (first, second)
    ]
    assert described[0] == described[1]
    assert first.config == second.config and first.files.keys() == second.files.keys()
    again = command("plan", ours, "--as-recipe")
    assert again.out == result.out


def test_moved_layers_are_no_recipe_of_ours(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "mergekit.yml"
    for text in (FRANKENMERGE, SLERP.replace("[0, 4]", "[0, 3]")):
        file.write_text(text)
        result = command("plan", file, "--as-recipe")
        assert (result.code, result.out) == (2, "")
        assert result.err.endswith("moerge's own recipes cannot move layers as these slices do: keep this file as it is\n")


def test_a_plus_in_a_path_that_is_written_as_a_mapping() -> None:
    models = [{"model": {"model": {"path": "a+b"}}}, {"model": {"model": {"path": "c+d", "revision": "x"}}}]
    recipe = load_recipe({"models": [{**model, "parameters": {"weight": 1}} for model in models], "merge_method": "linear"})
    assert [expert.model for expert in recipe.experts.values()] == ["a+b", "c+d@x"]
