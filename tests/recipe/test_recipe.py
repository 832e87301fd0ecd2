"""Recipes as objects: defaults, seeds, overrides, paths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from moerge import InputError, load_recipe, merge, plan
from moerge.methods.average import Average, Linear
from moerge.methods.dare import Dare
from moerge.methods.ties import Ties
from tests.helpers.command import moerge
from tests.helpers.tiny import make_models, read_tensors, write_recipe

MODELS = {"base": "base", "experts": {"math": "math", "code": "code"}}


def test_defaults() -> None:
    recipe = load_recipe({"experts": {"math": "here", "code": {"model": "there", "weight": 2}}, "merge": {"method": "linear"}})
    assert recipe.method == Linear()
    assert (recipe.base, recipe.moe, recipe.dtype, recipe.tokenizer, recipe.config) == (None,) * 5
    assert {name: (expert.model, expert.weight) for name, expert in recipe.experts.items()} == {
        "math": ("here", 1.0),
        "code": ("there", 2.0),
    }
    assert load_recipe({"experts": {"math": "here"}}).method == Average()
    moe = load_recipe({**MODELS, "moe": {}})
    assert moe.moe is not None
    assert (moe.moe.separate, moe.moe.top_k, moe.moe.format, moe.moe.router.kind) == (("ffn",), 2, "auto", "random")
    assert moe.includes_base
    assert not load_recipe({"experts": MODELS["experts"], "moe": {}}).includes_base


def test_the_merge_seed_reaches_every_method_that_draws() -> None:
    section = {"method": "dare", "seed": 7, "overrides": [{"match": "ffn"}, {"match": "norm", "method": "dare", "seed": 9}]}
    recipe = load_recipe({**MODELS, "merge": section})
    assert recipe.method == Dare(seed=7)
    assert [override.method for override in recipe.overrides] == [Dare(seed=7), Dare(seed=9)]
    assert load_recipe({**MODELS, "merge": {"method": "ties", "seed": 7}}).method == Ties()  # draws nothing, so ignores it


def test_the_seed_option_replaces_the_seeds_of_merge_and_router() -> None:
    recipe = load_recipe({**MODELS, "merge": {"method": "dare", "seed": 7}, "moe": {"router": {"seed": 8}}}, seed=3)
    assert recipe.method == Dare(seed=3)
    assert recipe.moe is not None and recipe.moe.router.model_dump()["seed"] == 3
    assert recipe.written["merge"]["seed"] == recipe.written["moe"]["router"]["seed"] == 3


def test_the_seed_option_changes_the_result_as_the_recipe_would(tmp_path: Path) -> None:
    make_models(tmp_path)
    dare = {"method": "dare", "density": 0.5}
    written = write_recipe(tmp_path, "five.yaml", merge={**dare, "seed": 5})
    other = write_recipe(tmp_path, "other.yaml", merge=dare)
    for name, recipe, options in (("a", written, ()), ("b", other, ("--seed", 5)), ("c", other, ())):
        assert moerge("merge", recipe, tmp_path / name, *options).code == 0
    a, b, c = (read_tensors(tmp_path / name) for name in "abc")
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert any(not np.array_equal(a[name], c[name]) for name in a)


def test_an_override_inherits_only_where_it_names_no_method() -> None:
    section = {
        "method": "ties",
        "density": 0.3,
        "overrides": [{"match": "ffn", "scale": 1.0}, {"match": "norm", "method": "ties"}],
    }
    recipe = load_recipe({**MODELS, "merge": section})
    assert [override.method for override in recipe.overrides] == [Ties(density=0.3, scale=1.0), Ties()]


def test_weights_count_where_one_of_the_methods_uses_them() -> None:
    experts = {"math": {"model": "math", "weight": 2}, "code": "code"}
    section = {"method": "linear", "overrides": [{"match": "norm", "method": "average"}]}
    assert load_recipe({"experts": experts, "merge": section}).experts["math"].weight == 2
    with pytest.raises(InputError, match=r"recipe: experts\.math has a weight, which average ignores"):
        load_recipe({"experts": experts})


def test_paths_start_from_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = make_models(tmp_path / "models")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipes").mkdir()
    experts = {"math": "../models/math", "code": str(models["code"])}
    recipe = write_recipe(tmp_path / "recipes", base="../models/base", experts=experts)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert moerge("merge", recipe, "out").code == 0
    assert (tmp_path / "elsewhere" / "out" / "model.safetensors").exists()


def test_a_dict_starts_from_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_models(tmp_path, base=False)
    monkeypatch.chdir(tmp_path)
    assert {model.name for model in plan({"experts": {"math": "math", "code": "code"}}).models} == {"math", "code"}
    with pytest.raises(InputError, match=r"recipe: experts\.math\.modell: unknown key, did you mean 'model'\?"):
        plan({"experts": {"math": {"modell": "math"}}})


def test_aliases_and_merge_keys_are_plain_yaml(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "experts:\n  math: &m {model: math, weight: 2}\n  code: {<<: *m, model: code}\nmerge: {method: linear}\n"
    )
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert {name: (expert.model, expert.weight) for name, expert in recipe.experts.items()} == {
        "math": ("math", 2.0),
        "code": ("code", 2.0),
    }


def test_merging_a_recipe_object_equals_merging_its_file(tmp_path: Path) -> None:
    make_models(tmp_path)
    path = write_recipe(tmp_path, merge={"method": "ties"})
    merge(path, tmp_path / "a")
    merge(load_recipe(path), tmp_path / "b")
    assert {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()
    }
