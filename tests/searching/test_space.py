"""SEARCH.yaml, paths into recipes, and weights that change smoothly with depth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge.errors import InputError
from moerge.operations.operations import Merge
from moerge.searching.settings import SmoothWeights, load_search
from moerge.searching.space import _at, get, put, read_space, with_paths
from moerge.searching.sweep import parse_sweep
from tests.helpers.tiny import make_models, write_recipe

TEXTS = {"bits_per_byte": {"math": "math.jsonl"}}


def file(folder: Path, **changes: Any) -> Path:
    make_models(folder)
    recipe = write_recipe(folder, merge={"method": "ties", "scale": 0.3})
    content = {"recipe": recipe.name, "search": {"merge.scale": {"range": [0.1, 1.0]}}, "objective": TEXTS, **changes}
    (folder / "search.yaml").write_text(yaml.safe_dump(content))
    return folder / "search.yaml"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"search": {"merge.scale": {"range": [1.0, 0.1]}}}, "range is empty"),
        ({"search": {"merge.scale": {"range": ["a", "b"]}}}, "merge.scale"),
        ({"search": {"merge.scale": {"choice": []}}}, "merge.scale"),
        ({"search": {"merge.scale": 1}}, "merge.scale"),
        ({"search": {}}, "search"),
        ({"search": {"weights": {"range": [0, 1], "by": ["layer"]}}}, "weights"),
        ({"objective": {"bits_per_byte": {}}}, "needs texts"),
        ({"objective": "bits_per_byte"}, "needs texts"),
        ({"objective": {"accuracy": {"math": "m"}}}, "accuracy"),
        ({"objective": {**TEXTS, "over": {"code": 1.0}}}, "'code'"),
        ({"objective": ["bytes", TEXTS], "sampler": "cmaes"}, "CMA-ES"),
        ({"sampler": "nsga2"}, "NSGA-II"),
        ({"heldout": {"code": "code.jsonl"}}, "'code'"),
        ({"trails": 3}, "trials"),
        ({"trials": 0}, "trials"),
    ],
)
def test_what_a_search_cannot_be_is_said(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="search") as raised:
        load_search(file(tmp_path, **changes))
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("search", "named"),
    [
        ({"merge.overrides[0].scale": {"range": [0.0, 1.0]}}, "merge.overrides"),
        ({"mergee.overrides.scale": {"range": [0.0, 1.0]}}, "mergee"),
        ({"merge.method": {"range": [0.0, 1.0]}}, "choice"),
        ({"merge.scale": {"choice": ["a", "b"]}}, "merge.scale"),
    ],
)
def test_paths_that_lead_nowhere_and_values_of_another_type_are_said(search: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = file(tmp_path, search=search)
    with pytest.raises(InputError, match="search") as raised:
        moerge.search(path, tmp_path / "out")
    assert named in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_point_is_the_recipe_with_its_values(tmp_path: Path) -> None:
    search = {
        "merge.scale": {"range": [0.1, 1.0]},
        "experts.math.weight": {"range": [0.0, 2.0]},
        "moe.top_k": {"choice": [1, 2]},
    }
    space = read_space(load_search(file(tmp_path, search=search)))
    assert space.start() == {"merge.scale": 0.3}
    recipe = space.recipe_of({"merge.scale": 0.7, "experts.math.weight": 0.25, "moe.top_k": 1})
    assert recipe["merge"]["scale"] == 0.7 and recipe["moe"] == {"top_k": 1}
    assert recipe["experts"]["math"] == {"model": str(tmp_path / "math"), "weight": 0.25}
    assert recipe["base"] == str(tmp_path / "base") and recipe["experts"]["code"] == str(tmp_path / "code")


def test_paths_start_where_the_file_lies(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "ties").mkdir()
    recipe = {"base": "models/a", "experts": {"x": {"model": "models/a#3"}, "y": "owner/name"}, "merge": {"method": "ties"}}
    absolute = with_paths(recipe, tmp_path, None)
    assert absolute["base"] == str(tmp_path / "models/a") and absolute["experts"]["x"]["model"] == f"{tmp_path}/models/a#3"
    assert absolute["experts"]["y"] == "owner/name" and absolute["merge"] == {"method": "ties"}
    there = with_paths(absolute, Path("/"), tmp_path / "out")
    assert there["base"] == "../models/a" and there["experts"]["x"]["model"] == "../models/a#3"


@given(st.lists(st.floats(-1, 3), min_size=1, max_size=5), st.integers(1, 40))
def test_weights_are_straight_lines_between_their_points(values: list[float], layers: int) -> None:
    smooth = SmoothWeights(points=len(values), range=(-1.0, 3.0))
    point = {f"weights.math.all.{index}": value for index, value in enumerate(values)}
    depths = np.arange(layers) / max(1, layers - 1)
    expected = np.interp(depths * (len(values) - 1), np.arange(len(values)), values)
    found = [_at(smooth, point, "math", "ffn", depth) for depth in depths]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_smooth_weights_become_overrides_of_layers(tmp_path: Path) -> None:
    search = {"weights": {"by": ["expert", "role"], "points": 2, "range": [0.0, 1.0]}}
    space = read_space(load_search(file(tmp_path, search=search)))
    assert len(space.kinds) == 3 * 2 * 2
    point = {name: 0.25 if name.endswith("ffn.1") else 1.0 for name in space.kinds}
    weights = {o.name: o.operation.weights for o in space.plan(point).outputs if isinstance(o.operation, Merge)}
    last = max(name for name in weights if "mlp" in name)
    assert weights[last] == (0.25, 0.25, 0.25) and weights[last.replace(last.split(".")[2], "0", 1)] == (1.0, 1.0, 1.0)


@given(st.dictionaries(st.sampled_from(["merge", "moe"]), st.dictionaries(st.sampled_from("ab"), st.integers()), min_size=1))
def test_what_is_put_is_got(recipe: dict[str, Any]) -> None:
    put(recipe, "merge.a", 7)
    assert get(recipe, "merge.a") == 7 and get(recipe, "merge.b.c") is None


@pytest.mark.parametrize(
    ("text", "values"),
    [("merge.scale=0.2:1:5", [0.2, 0.4, 0.6, 0.8, 1.0]), ("merge.method=ties,dare", ["ties", "dare"]), ("moe.top_k=1,2", [1, 2])],
)
def test_sweeps_are_read(text: str, values: list[Any]) -> None:
    assert parse_sweep(text) == (text.partition("=")[0], values)


@pytest.mark.parametrize("text", ["merge.scale", "=1", "a=0:1", "a=0:1:x", "a=0:1:1000", "a=[1"])
def test_other_sweeps_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--sweep"):
        parse_sweep(text)
