"""Models of a recipe that are recipes themselves: what comes out is what merging them into folders first gives, to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import moerge as api
from moerge import InputError
from tests.helpers import adapters, tiny
from tests.helpers.command import moerge

PAIR = {"math": "math", "code": "code"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    tiny.make_models(folder, experts=("math", "code", "knowledge"))
    changed = ("model.layers.0.self_attn.q_proj", (16, 16))
    adapters.write_adapter(folder / "lora", adapters.low_rank(*changed, rank=2), r=2, lora_alpha=4)
    return folder


@pytest.fixture
def here(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(models)
    return models


def absolute(here: Path) -> dict[str, Any]:
    """A recipe that means the same wherever it stands."""
    experts = {name: str(here / name) for name in PAIR}
    return {"base": str(here / "base"), "experts": experts, "merge": {"method": "ties"}}


def outer(expert: Any, **more: Any) -> dict[str, Any]:
    return {"base": "base", "experts": {"inner": expert, "knowledge": "knowledge"}, "merge": {"method": "ties"}, **more}


def assert_same_models(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert actual.keys() == expected.keys()
    for name, bits in expected.items():
        assert actual[name].dtype == bits.dtype and actual[name].tobytes() == bits.tobytes(), name


def merged(recipe: Any, out: Path, **options: Any) -> dict[str, np.ndarray]:
    api.merge(recipe, out, **options)
    assert api.verify(out, threads=1).problems == ()
    return tiny.read_tensors(out)


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "average"},
        {"method": "ties", "scope": "model"},
        {"method": "dare", "seed": 3},
        {"method": "della"},
        {"method": "model_stock", "filter_wise": True},
        {"method": "tsv_m"},
        {"method": "nuslerp", "vectors": "row"},
        {"method": "passthrough", "model": "code"},
    ],
    ids=lambda merge: merge["method"],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_is_the_merge_in_two_steps(merge: dict[str, Any], dtype: str, here: Path, tmp_path: Path) -> None:
    inner = {"base": "base", "experts": PAIR, "merge": merge, "dtype": dtype}
    api.merge(inner, tmp_path / "inner", threads=1)
    expected = merged(outer(str(tmp_path / "inner")), tmp_path / "two", threads=1)
    assert_same_models(merged(outer(inner), tmp_path / "one", threads=3), expected)


def test_recipes_nest_in_files_mappings_and_bases(here: Path, tmp_path: Path) -> None:
    """Paths in a file start from its own folder; a weight may stand beside."""
    inner = {
        "base": str(here / "base"),
        "experts": {"m": str(here / "math"), "c": str(here / "code")},
        "merge": {"method": "ties"},
    }
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "inner.yaml").write_text(yaml.safe_dump(inner))
    middle = {"experts": {"a": "deeper/inner.yaml", "b": {**inner, "weight": 0.25}}, "merge": {"method": "linear"}}
    (tmp_path / "middle.yaml").write_text(yaml.safe_dump(middle))
    recipe = {"base": inner, "experts": {"x": str(tmp_path / "middle.yaml"), "y": "knowledge"}, "merge": {"method": "dare"}}
    one = merged(recipe, tmp_path / "one")

    api.merge(inner, tmp_path / "i")
    folders = {"a": str(tmp_path / "i"), "b": {"model": str(tmp_path / "i"), "weight": 0.25}}
    api.merge({"experts": folders, "merge": {"method": "linear"}}, tmp_path / "m")
    steps = {"base": str(tmp_path / "i"), "experts": {"x": str(tmp_path / "m"), "y": "knowledge"}, "merge": {"method": "dare"}}
    assert_same_models(one, merged(steps, tmp_path / "two"))


def test_a_mixture_takes_merges_as_experts(here: Path, tmp_path: Path) -> None:
    inner = {"base": "base", "experts": PAIR, "merge": {"method": "ties"}}
    api.merge(inner, tmp_path / "inner")
    one = merged(outer(inner, moe={}), tmp_path / "one")
    assert_same_models(one, merged(outer(str(tmp_path / "inner"), moe={}), tmp_path / "two"))


def test_tokens_of_a_union_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The inner result's tokenizer and rows are found, although there is no folder of it."""
    monkeypatch.chdir(tmp_path)
    for index, (name, more) in enumerate({"a": ["sin"], "b": ["cos"], "c": []}.items()):
        tokens = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, 40)), *more]
        config = tiny.llama_config(vocab_size=len(tokens))
        folder = tiny.write_checkpoint(tmp_path / name, tiny.llama_tensors(config, seed=index), config, dtype="F32")
        tiny.write_tokenizer(folder, tokens)
    inner = {"experts": {"a": "a", "b": "b"}, "tokenizer": "union"}
    api.merge(inner, "inner")
    recipe = {"experts": {"ab": inner, "c": "c"}, "tokenizer": "ab"}
    one = merged(recipe, tmp_path / "one")
    assert_same_models(one, merged({**recipe, "experts": {"ab": "inner", "c": "c"}}, tmp_path / "two"))
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tmp_path / "inner" / "tokenizer.json").read_bytes()


def test_an_adapter_on_a_model_of_its_own(here: Path, tmp_path: Path) -> None:
    """The model with the adapter, as if it had been merged into it in float32; also on a recipe."""
    both, passed = {"model": "math", "adapter": "lora"}, {"method": "passthrough", "model": "l"}
    adapted = merged({"base": "math", "experts": {"l": "lora"}, "merge": passed, "dtype": "float32"}, tmp_path / "l")
    ties = {"base": "base", "merge": {"method": "ties"}}
    one = merged({**ties, "experts": {"a": both, "b": "code"}}, tmp_path / "one")
    assert_same_models(one, merged({**ties, "experts": {"a": str(tmp_path / "l"), "b": "code"}}, tmp_path / "two"))
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not np.array_equal(tiny.read_values(tmp_path / "l")[changed], tiny.read_values(here / "math")[changed])

    nested = {"model": {"experts": {"m": "math"}, "dtype": "float32"}, "adapter": "lora"}
    assert_same_models(merged({"experts": {"a": nested}, "dtype": "float32"}, tmp_path / "three"), adapted)


def test_what_a_person_sees(here: Path, tmp_path: Path) -> None:
    inner = absolute(here)
    written = {"base": inner["base"], "experts": {"all": inner}, "merge": {"method": "ties"}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written, sort_keys=False))
    result = moerge("plan", tmp_path / "recipe.yaml", "--json")
    assert result.code == 0 and result.json["models"]["all"] == "a recipe of math, code"
    assert moerge("merge", tmp_path / "recipe.yaml", tmp_path / "out").code == 0
    manifest = json.loads((tmp_path / "out" / "moerge.json").read_text())
    assert list(manifest["recipe"]["experts"]["all"]["experts"]) == ["math", "code"]
    again = moerge("merge", tmp_path / "recipe.yaml", tmp_path / "out", "--resume")
    assert again.code == 0, again.err


def test_an_inner_change_is_another_plan(here: Path) -> None:
    def plan(method: str) -> api.Plan:
        return api.plan(outer({"base": "base", "experts": PAIR, "merge": {"method": method}}))

    assert plan("ties").fingerprint == plan("ties").fingerprint != plan("dare").fingerprint


def test_the_seed_reaches_inside(here: Path) -> None:
    recipe = outer({"base": "base", "experts": PAIR, "merge": {"method": "dare"}})
    assert api.plan(recipe).fingerprint != api.plan(recipe, seed=5).fingerprint


def test_nan_is_blamed_on_the_file_that_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.make_models(tmp_path)
    tensors = tiny.read_values(tmp_path / "code")
    tensors["model.norm.weight"][0] = np.nan
    tiny.write_safetensors(tmp_path / "code" / "model.safetensors", tensors)
    with pytest.raises(InputError, match=r"^code: tensor 'model\.norm\.weight' holds NaN"):
        api.merge({"experts": {"all": {"experts": PAIR}}, "merge": {"method": "linear"}, "dtype": "float32"}, "out")
    assert not (tmp_path / "out").exists()


def refused(recipe: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        api.plan(recipe)


def test_a_recipe_that_contains_itself(here: Path, tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"experts: {{x: {other}.yaml}}\n")
    refused(tmp_path / "a.yaml", r"cannot be one of its own models \(.*a\.yaml -> .*b\.yaml -> .*a\.yaml\)")
    result = moerge("merge", tmp_path / "a.yaml", tmp_path / "out")
    assert result.code == 2 and result.err.count("\n") == 1 and not (tmp_path / "out").exists()
    recipe: dict[str, Any] = {"experts": {}}
    recipe["experts"]["x"] = recipe
    refused(recipe, "contains itself")


def test_bad_inner_recipes_are_named(here: Path, tmp_path: Path) -> None:
    refused(outer({"experts": PAIR, "merge": {"method": "tis"}}), r"experts\.inner: merge\.method: .*'ties'")
    refused(outer({"experts": PAIR, "merge": {"method": "ties"}}), r"experts\.inner: merge: ties works on task vectors")
    refused(outer("absent.yaml"), r"there is no recipe .*absent\.yaml")
    refused(outer({"experts": {"math": "maths"}}), "maths")
    refused({"experts": {"a": {"model": "math", "adapter": "code"}}}, r"adapter of a: .* is a whole model")
    written = tmp_path / "recipe.yaml"
    written.write_text("experts:\n  a:\n    experts: {b: c}\n    merg: {}\n")
    refused(written, r"recipe\.yaml: experts\.a, line 4: merg: unknown key")
