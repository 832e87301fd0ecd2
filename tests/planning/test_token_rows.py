"""Rows that a recipe gives to single tokens, and embeddings padded to a multiple."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.errors import InputError
from moerge.planning.equivalent import equivalent_recipe
from tests.helpers.tiny import read_values
from tests.helpers.vocabularies import EMBEDDING, HEAD, row, value, write_model

TOKENS = {
    "w3": {"source": "a", "force": True},
    "<x>": "b",
    "<zero>": {"source": {"kind": "zero"}},
    "<copy>": {"source": {"kind": "model_token", "model": "a", "token": "w4"}},
    "w5": {"source": {"kind": "model_token", "model": "a", "token_id": 0}},
}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    write_model(tmp_path / "base", ["w3", "w4"], dtype="F32")
    write_model(tmp_path / "a", ["w4", "w3"], dtype="F32", expert=0)
    write_model(tmp_path / "b", ["w3", "w4", "w5"], added=["<x>"], dtype="F32", expert=1)
    models = {"base": str(tmp_path / "base"), "experts": {name: str(tmp_path / name) for name in "ab"}}
    return {**models, "merge": {"method": "task_arithmetic", "scale": 0.5}}


def own(model: str, tensor: str, text: str) -> np.ndarray:
    return value(model, tensor, text, "F32")


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_rows_and_padding(recipe: dict[str, Any], tmp_path: Path, method: str) -> None:
    merge = {"method": method, **({"scale": 0.5} if method != "linear" else {})}
    recipe |= {"merge": merge, "tokenizer": {"source": "base", "tokens": TOKENS, "pad_to_multiple_of": 16}}
    out = tmp_path / "out"
    moerge.merge(recipe, out)
    tensors = read_values(out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 16
    for name in (EMBEDDING, HEAD):
        assert tensors[name].shape[0] == 16
        given = {"w3": own("a", name, "w3"), "<x>": own("b", name, "<x>"), "<zero>": 0, "<copy>": own("a", name, "w4")}
        for token in ("w3", "<zero>", "<copy>"):
            assert np.array_equal(row(out, name, token), np.broadcast_to(given[token], 16)), token
        assert np.array_equal(row(out, name, "<x>"), given["<x>"])
        lacking, having = own("a", name, "<unk>"), own("b", name, "w5")
        merged = lacking + 0.5 * (having - lacking)
        np.testing.assert_allclose(row(out, name, "w5"), merged, atol=1e-6)
        tokens = 5 + 4
        np.testing.assert_allclose(tensors[name][tokens:], np.tile(tensors[name][:tokens].mean(0), (7, 1)), atol=1e-6)


def test_the_same_as_a_recipe_of_ours(recipe: dict[str, Any], tmp_path: Path) -> None:
    base, a, b = recipe["base"], *recipe["experts"].values()
    tokens = {"w3": {"source": a, "force": True}, "w4": {"source": {"kind": "model_token", "model": b, "token_id": 2}}}
    foreign = {
        "models": [{"model": a}, {"model": b}],
        "base_model": base,
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 1, "lambda": 0.5},
        "dtype": "float32",
        "tokenizer": {"source": "union", "tokens": {**tokens, "<none>": {"source": {"kind": "zero"}}}, "pad_to_multiple_of": 8},
    }
    moerge.merge(foreign, tmp_path / "one")
    moerge.merge(equivalent_recipe(moerge.plan(foreign)), tmp_path / "two")
    one, two = read_values(tmp_path / "one"), read_values(tmp_path / "two")
    assert one.keys() == two.keys() and all(np.array_equal(one[key], two[key]) for key in one)
    assert np.array_equal(row(tmp_path / "one", HEAD, "w3"), own("a", HEAD, "w3"))


BAD = [
    ({"tokens": {"w3": "c"}}, r"tokenizer\.tokens\.w3: 'c'.*not a model"),
    ({"tokens": {"w3": {"source": {"kind": "mean"}}}}, r"tokenizer\.tokens\.w3\.source\.kind should be one of zero, model_token"),
    ({"tokens": {"w3": {"force": True}}}, r"tokenizer\.tokens\.w3\.source is missing"),
    ({"tokens": {"w3": {"source": "a", "force": 1}}}, r"tokenizer\.tokens\.w3\.force"),
    ({"tokens": {"<new>": "a"}}, r"a has no token '<new>'"),
    ({"tokens": {"w3": {"source": {"kind": "model_token", "model": "a", "token_id": 99}}}}, r"'w3': a has 5 rows.*99"),
    ({"tokens": {"w3": {"source": {"kind": "model_token", "model": "a"}}}}, r"either a 'token' or a 'token_id'"),
    ({"pad_to_multiple_of": 0}, r"tokenizer\.pad_to_multiple_of should be a positive"),
    ({"padding": 8}, r"tokenizer\.padding: unknown key"),
    ({"source": "c"}, r"tokenizer: 'c'"),
]


@pytest.mark.parametrize(("section", "message"), BAD, ids=[str(message) for _, message in BAD])
def test_a_bad_section_is_refused(recipe: dict[str, Any], section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        moerge.plan({**recipe, "tokenizer": {"source": "base", **section}})


def test_experts_that_stay_whole_models_take_no_rows(recipe: dict[str, Any]) -> None:
    moe = {"format": "moerge", "projectors": "random", "router": {"kind": "random"}}
    tokenizer = {"source": "base", "pad_to_multiple_of": 8}
    with pytest.raises(InputError, match=r"tokenizer: .*give its name and no more"):
        moerge.plan({**recipe, "merge": {"method": "average"}, "moe": moe, "tokenizer": tokenizer})
