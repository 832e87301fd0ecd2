"""`moerge compare` as people and programs call it."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from moerge import figures
from tests.helpers.command import moerge
from tests.helpers.tiny import llama_config, llama_tensors, make_models, write_checkpoint, write_recipe

TABLES = ["compare.json", "verdict.csv", "pairs.csv", "experts.csv"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_models(tmp_path)
    return write_recipe(tmp_path, merge={"method": "ties", "density": 0.7})


def test_table_reasons_and_advice(recipe: Path) -> None:
    result = moerge("compare", recipe)
    assert result.code == 0
    flat = " ".join(result.out.split())
    assert "task vectors of math, code, knowledge" in flat
    assert "role size cosine least opposite drift distance verdict" in flat
    assert "norm: merge. they are few, and alike wherever attention or ffn are merged" in flat
    assert "advice: a dense merge should work" in flat


def test_without_a_base_it_says_so(recipe: Path) -> None:
    result = moerge("compare", write_recipe(recipe.parent, base=None))
    flat = " ".join(result.out.split())
    assert "parameters (the recipe has no base, so there are no task vectors) of math, code, knowledge" in flat
    assert "drift" not in flat


def test_json_and_files_hold_the_same(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    result = moerge("compare", recipe, "--out", out, "--json", "--threads", 1)
    assert result.code == 0
    assert json.loads((out / "compare.json").read_text()) == result.json
    assert (result.json["densities"], result.json["experts"]) == ([0.7], ["math", "code", "knowledge"])
    for name, key in (("verdict", "verdicts"), ("pairs", "pairs"), ("experts", "rows")):
        with (out / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows == [{k: "" if v is None else str(v) for k, v in row.items()} for row in result.json[key]]
    drawn = [f"{name}.{kind}" for name in ("cosine", "conflict", "pairs", "drift", "ties") for kind in ("svg", "png")]
    assert sorted(path.name for path in out.iterdir()) == sorted([*TABLES, *(drawn if find_spec("matplotlib") else [])])


def test_without_matplotlib_tables_are_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    result = moerge("compare", recipe, "--out", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(TABLES)
    flat = " ".join(result.out.split())
    assert "written: compare.json, verdict.csv, pairs.csv, experts.csv in" in flat
    assert "(no figures: pip install 'moerge[figures]')" in flat


def test_quiet_leaves_the_verdict(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    result = moerge("compare", recipe, "--quiet", "--out", tmp_path / "out")
    lines = result.out.splitlines()
    assert lines[0].startswith("embedding: ")
    assert "written" not in result.out and "role " not in result.out


def test_a_density_of_ones_own(recipe: Path) -> None:
    assert moerge("compare", recipe, "--density", "0.2", "--json").json["densities"] == [0.2]


@pytest.mark.parametrize("density", ["0", "1.5", "-1", "nan"])
def test_densities_lie_between_0_and_1(recipe: Path, density: str) -> None:
    result = moerge("compare", recipe, f"--density={density}")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"moerge: the density {float(density)} is not in (0, 1]\n"


def test_against_the_verdict(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_checkpoint(tmp_path / name, llama_tensors(llama_config(), seed=seed))
    flat = " ".join(moerge("compare", write_recipe(tmp_path, base=None, experts=["a", "b"])).out.split())
    assert "advice: do not average these models" in flat
    assert "this recipe merges embedding, attention, ffn, head, norm, against the verdict" in flat


def test_nan_is_an_error_that_names_the_tensor(recipe: Path) -> None:
    tensors = llama_tensors(llama_config(), expert=1)
    tensors["model.norm.weight"][3] = np.nan
    write_checkpoint(recipe.parent / "code", tensors)
    result = moerge("compare", recipe)
    assert (result.code, result.out) == (2, "")
    assert "moerge: code: tensor 'model.norm.weight' holds NaN or infinity: repair or drop this expert" in result.err


def test_out_that_is_a_file(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    result = moerge("compare", recipe, "--out", tmp_path / "file")
    assert (result.code, result.out) == (2, "")
    assert result.err == f"moerge: --out: {tmp_path / 'file'} cannot be a folder: {tmp_path / 'file'} is a file\n"
    assert (tmp_path / "file").read_text() == "mine"


def test_an_override_that_matches_nothing(recipe: Path) -> None:
    merge = {"method": "ties", "overrides": [{"match": "atention", "method": "average"}]}
    result = moerge("compare", write_recipe(recipe.parent, merge=merge))
    assert result.code == 2
    assert "merge.overrides: 'atention' matches no tensor that is merged" in result.err


def test_shapes_that_differ(recipe: Path) -> None:
    make_models(recipe.parent, experts=["code"], base=False, config={"intermediate_size": 32})
    result = moerge("compare", recipe)
    assert (result.code, result.out) == (2, "")
    assert "these models do not have the same shape: intermediate_size" in result.err
