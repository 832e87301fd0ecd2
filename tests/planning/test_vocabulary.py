"""Models whose vocabularies differ: rows are matched by token text, and who lacks a row dilutes nothing."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moerge as api
from moerge.methods.method import merge_methods
from moerge.tensors.dtypes import DTYPES
from moerge.tokenizer import read_vocabulary
from tests.helpers import reference
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import decode, edit_config, encode, read_tensors, read_values, write_json, write_recipe
from tests.helpers.vocabularies import EMBEDDING, HEAD, SPECIAL, differing, padded, row, value, write_model

POOL = [f"w{number}" for number in range(3, 12)]


@st.composite
def token_lists(draw: st.DrawFn) -> dict[str, Any]:
    """The arguments of `write_model` for base, a and b: some of POOL in any order, some added, some padding."""
    models = {}
    for name in ("base", "a", "b"):
        tokens = draw(st.permutations(draw(st.lists(st.sampled_from(POOL), unique=True, min_size=1))))
        cut = draw(st.integers(max(1, len(tokens) - 2), len(tokens)))
        rows = draw(st.sampled_from([None, 16, 16, 24]))
        models[name] = {"tokens": tokens[:cut], "added": tokens[cut:], "rows": rows}
    return models


def texts_of(model: Mapping[str, Any]) -> list[str]:
    """Tokens by id."""
    return [*SPECIAL, *model["tokens"], *model["added"]]


def rows_of(model: Mapping[str, Any]) -> int:
    return model["rows"] or len(texts_of(model))


def union_of(models: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(text for model in models.values() for text in texts_of(model)))


def aligned(
    models: Mapping[str, Any], texts: Sequence[str], size: int, source: str, tensor: str, dtype: str, members: Sequence[str]
) -> tuple[dict[str, list[np.ndarray]], list[np.ndarray | None]]:
    """Slow and obvious: every involved model's row for every row of the result, and the rows that one alone has."""
    rows: dict[str, list[np.ndarray]] = {name: [] for name in members}
    exact: list[np.ndarray | None] = []
    for number in range(size):
        text = texts[number] if number < len(texts) else None
        having = {name: value(name, tensor, text, dtype) for name in models if text in texts_of(models[name])} if text else {}
        if not having:  # padding: the source's row, its last where it has fewer
            place = min(number, rows_of(models[source]) - 1)
            own = texts_of(models[source])
            having = {source: value(source, tensor, own[place] if place < len(own) else f"padding {place - len(own)}", dtype)}
        involved = {name: having[name] for name in members if name in having}
        owner = next(iter((involved or having).values())) if len(involved) <= 1 else None
        exact.append(owner)
        for name in members:
            others = [involved[other] for other in members if other in involved and other != "base"]
            filled = involved.get("base", np.mean(others, axis=0, dtype=np.float64).astype(np.float32) if others else owner)
            rows[name].append(involved.get(name, filled))
            in_place = texts_of(models[name]) == list(texts[: len(texts_of(models[name]))]) and set(texts) <= set(
                texts_of(models[name])
            )
            if text is None and in_place and rows_of(models[name]) == size:  # such tensors are used as they are
                padding = f"padding {number - len(texts_of(models[name]))}"
                rows[name][-1] = value(name, tensor, padding, dtype)
    return rows, exact


def expected(method: str, rows: Mapping[str, list[np.ndarray]], exact: Sequence[np.ndarray | None]) -> np.ndarray:
    experts_KN = np.stack([np.concatenate(rows[name]) for name in ("a", "b")])
    if method == "average":
        merged = reference.average(experts_KN)
    else:
        base_N = np.concatenate(rows["base"])
        if method == "ties":
            taken = reference.ties({"t": base_N}, [{"t": e} for e in experts_KN], [1, 1], density=0.5, scale=0.5)
            merged = taken["t"]
        else:
            merged = reference.task_arithmetic(base_N, experts_KN, [1, 1], scale=0.5)
    merged = merged.reshape(len(exact), -1)
    for number, owner in enumerate(exact):
        if owner is not None:
            merged[number] = owner
    return merged


@settings(max_examples=25)
@given(
    models=token_lists(),
    setting=st.sampled_from(["base", "a", "union", "union"]),
    method=st.sampled_from(["average", "task_arithmetic", "ties"]),
    dtype=st.sampled_from(["F32", "BF16"]),
    tied=st.booleans(),
)
def test_rows_equal_a_dictionary_of_tokens(models: dict[str, Any], setting: str, method: str, dtype: str, tied: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in models.items():
            write_model(Path(folder) / name, **arguments, tied=tied, dtype=dtype, num_hidden_layers=1)
        more = {"average": {}, "task_arithmetic": {"scale": 0.5}, "ties": {"scale": 0.5, "density": 0.5}}[method]
        recipe = write_recipe(Path(folder), experts=("a", "b"), tokenizer=setting, merge={"method": method, **more})
        out = Path(folder) / "out"
        api.merge(recipe, out, threads=1)
        merged, config = read_tensors(out), json.loads((out / "config.json").read_text())
        assert api.verify(out, threads=1).problems == ()
        vocabulary = read_vocabulary(out)
    source = "base" if setting == "union" else setting
    texts = union_of(models) if setting == "union" else texts_of(models[source])
    assert vocabulary is not None
    assert dict(vocabulary.ids) == {text: number for number, text in enumerate(texts)}
    size = config["vocab_size"]
    assert size >= len(texts)
    if len(texts) <= rows_of(models[source]):
        assert size == rows_of(models[source])
    members = ("a", "b") if method == "average" else ("base", "a", "b")
    for tensor in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        rows, exact = aligned(models, texts, size, source, tensor, dtype, members)
        wanted = encode(expected(method, rows, exact), DTYPES[dtype])
        assert np.array_equal(merged[tensor], wanted), (tensor, size)


SETTINGS: dict[str, dict[str, Any]] = {"linear": {}, "dare": {"scale": 1.0}}
NEEDS_MORE = {"fisher", "regmean", "passthrough", "coefficients", "nearswap", "noise", "arcee_fusion"}
"""Methods that want statistics, a model's name or a file, or that take one expert only."""


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("method", sorted(set(merge_methods()) - NEEDS_MORE))
def test_a_token_of_one_model_alone_keeps_its_row(tmp_path: Path, method: str, dtype: str) -> None:
    write_model(tmp_path / "base", ["w3", "w4", "old"], dtype=dtype, num_hidden_layers=1)
    write_model(tmp_path / "a", ["w4", "w3"], added=["<|a|>"], dtype=dtype, num_hidden_layers=1, expert=0)
    write_model(tmp_path / "b", ["w3", "w4"], added=["<|b|>"], dtype=dtype, num_hidden_layers=1, expert=1)
    weighted = {"a": {"model": "a", "weight": 0.3}, "b": "b"} if method == "linear" else ("a", "b")
    recipe = write_recipe(tmp_path, experts=weighted, tokenizer="union", merge={"method": method, **SETTINGS.get(method, {})})
    result = moerge("merge", recipe, tmp_path / "out")
    assert result.code == 0, result.err
    for tensor in (EMBEDDING, HEAD):
        for model, text in (("base", "old"), ("a", "<|a|>"), ("b", "<|b|>")):
            assert np.array_equal(row(tmp_path / "out", tensor, text), value(model, tensor, text, dtype)), (tensor, text)


def test_weights_decide_what_those_that_lack_a_row_get(tmp_path: Path) -> None:
    """linear over three of which two have the token: their weighted mean, as if the third were not there."""
    write_model(tmp_path / "a", ["w3"], added=["<|x|>"], dtype="F32")
    write_model(tmp_path / "b", ["<|x|>", "w3"], dtype="F32")
    write_model(tmp_path / "c", ["w3"], dtype="F32")
    experts = {name: {"model": name, "weight": weight} for name, weight in {"a": 1.0, "b": 3.0, "c": 4.0}.items()}
    recipe = write_recipe(tmp_path, base=None, experts=experts, tokenizer="a", merge={"method": "linear"})
    api.merge(recipe, tmp_path / "out", threads=1)
    wanted = (value("a", HEAD, "<|x|>", "F32") + 3 * value("b", HEAD, "<|x|>", "F32")) / 4
    assert np.allclose(row(tmp_path / "out", HEAD, "<|x|>"), wanted, rtol=1e-6)


def test_a_missing_row_is_the_bases_where_the_base_has_it(tmp_path: Path) -> None:
    write_model(tmp_path / "base", ["w3", "w4"], dtype="F32")
    write_model(tmp_path / "a", ["w3", "w4"], dtype="F32")
    write_model(tmp_path / "b", ["w4"], dtype="F32")
    recipe = write_recipe(tmp_path, experts=("a", "b"), tokenizer="base", merge={"method": "task_arithmetic", "scale": 0.5})
    api.merge(recipe, tmp_path / "out", threads=1)
    base, expert = (value(name, HEAD, "w3", "F32") for name in ("base", "a"))
    assert np.allclose(row(tmp_path / "out", HEAD, "w3"), base + 0.5 * (expert - base), rtol=1e-5, atol=1e-6)


def test_padding_is_settled_with_a_note(tmp_path: Path) -> None:
    recipe = padded(tmp_path, base=8, b=16)
    result = moerge("merge", recipe, tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    note = "embeddings differ by rows that are no token's only (base 8, a 6, b 16): the result has 8, as base"
    assert note in " ".join(moerge("plan", recipe).out.split())
    merged = read_values(tmp_path / "out")[EMBEDDING]
    assert merged.shape == (8, 16)
    assert np.array_equal(merged[7], value("base", EMBEDDING, "padding 1"))
    wanted = (value("a", EMBEDDING, "w4") + value("b", EMBEDDING, "w4")) / 2
    assert np.array_equal(merged[4], decode(encode(wanted, DTYPES["BF16"]), DTYPES["BF16"]))


def test_models_that_agree_keep_their_own_padding(tmp_path: Path) -> None:
    recipe = padded(tmp_path, base=8, a=8, b=8)
    planned = api.plan(recipe)
    sources = next(output for output in planned.outputs if output.name == HEAD).operation.sources
    assert [type(source.tensor).__name__ for source in sources] == ["StoredTensor"] * 2
    assert planned.vocabulary == {"source": "base"}


def test_models_that_stand_in_place_are_read_as_they_are(tmp_path: Path) -> None:
    recipe = padded(tmp_path, base=8, a=8)
    sources = next(output for output in api.plan(recipe).outputs if output.name == HEAD).operation.sources
    assert [type(source.tensor).__name__ for source in sources] == ["StoredTensor", "RowsTensor"]


@pytest.mark.parametrize(("rows", "new", "size"), [(None, 3, 9), (8, 2, 8), (8, 3, 16), (24, 20, 32), (384, 400, 512)])
def test_how_large_the_result_is(tmp_path: Path, rows: int | None, new: int, size: int) -> None:
    """Three special tokens and three others: the source's size where that suffices, else a multiple of its power of two."""
    write_model(tmp_path / "base", ["w3", "w4", "w5"], rows=rows)
    write_model(tmp_path / "a", ["w3", "w4", "w5"], added=[f"<|{number}|>" for number in range(new)])
    recipe = write_recipe(tmp_path, experts=("a",), tokenizer="union")
    assert api.plan(recipe).config["vocab_size"] == size


def test_nothing_said(tmp_path: Path) -> None:
    refuses(
        differing(tmp_path),
        tmp_path / "out",
        'the vocabularies of base and a differ: only a has "<|im_start|>", "<|im_end|>"; "w3", "w4" have other ids; '
        "say whose tokens to keep: 'tokenizer: base', 'tokenizer: a' or 'tokenizer: union'",
    )


def test_plan_manifest_and_card_count_tokens(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="union")
    out = tmp_path / "out"
    result = moerge("merge", recipe, out)
    assert (result.code, result.err) == (0, "")
    counts = {
        "base": {"shared": 5, "added": 0, "missing": 2, "left_out": 0},
        "a": {"shared": 7, "added": 2, "missing": 0, "left_out": 0},
        "b": {"shared": 5, "added": 0, "missing": 2, "left_out": 0},
    }
    manifest = json.loads((out / "moerge.json").read_text())
    facts = {key: value for key, value in manifest["vocabulary"].items() if key not in ("digest", "notes")}
    assert facts == {"source": "base", "union": True, "tokens": 7, "rows": 7, "models": counts}
    notes = moerge("plan", recipe, "--json").json["notes"]
    assert notes[1:] == [
        "the result has 7 tokens in 7 rows",
        'tokens: base has 5 of them, lacks "<|im_start|>", "<|im_end|>"',
        "tokens: a has 7 of them, brings 2",
        'tokens: b has 5 of them, lacks "<|im_start|>", "<|im_end|>"',
    ]
    card = (out / "README.md").read_text()
    assert '- tokens: base has 5 of them, lacks "&lt;|im_start|&gt;", "&lt;|im_end|&gt;"' in card
    assert "tokenizer      7 tokens, 7 rows" in moerge("inspect", out).out


def test_tokens_without_a_row_do_not_count(tmp_path: Path) -> None:
    """A [PAD] that somebody gave a tokenizer, but not the model."""
    recipe = padded(tmp_path)
    path = tmp_path / "a" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 6, "content": "[PAD]"})
    write_json(path, tokenizer)
    assert api.plan(recipe).vocabulary == {"source": "base"}
    api.merge(write_recipe(tmp_path, experts=("a", "b"), tokenizer="a"), tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()
    assert read_values(tmp_path / "out")[HEAD].shape == (6, 16)
    write_model(tmp_path / "b", ["w3", "w4", "w5"], added=["<|b|>"])
    for setting, rows in {"a": 6, "union": 7}.items():
        planned = api.plan(write_recipe(tmp_path, experts=("a", "b"), tokenizer=setting))
        assert (planned.config["vocab_size"], planned.vocabulary["models"]["a"]["shared"]) == (rows, 6)


def test_tokens_that_are_left_out_are_named(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="base")
    assert 'tokens: a has 5 of them, loses "<|im_start|>", "<|im_end|>"' in api.plan(recipe).notes
    write_model(tmp_path / "a", ["w3", "w4"], added=["[INST]", "[/INST]"])
    assert 'tokens: a has 5 of them, loses "[INST]", "[/INST]"' in " ".join(moerge("plan", recipe).out.split())


@pytest.mark.parametrize("setting", ["a", "union"])
def test_special_tokens_are_those_of_the_tokenizers_source(tmp_path: Path, setting: str) -> None:
    recipe = differing(tmp_path, tokenizer=setting, config="b")
    edit_config(tmp_path / "base", eos_token_id=[2, 3])
    edit_config(tmp_path / "a", eos_token_id=[6, 2], bos_token_id=None)
    edit_config(tmp_path / "b", bos_token_id=4, pad_token_id=3)
    write_json(tmp_path / "a" / "generation_config.json", {"eos_token_id": [6, 2]})
    api.merge(recipe, tmp_path / "out", threads=1)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ids = read_vocabulary(tmp_path / "out").ids  # type: ignore[union-attr]
    if setting == "a":
        # a says where texts end; what it does not say is b's, by text: w4 and w3 stand elsewhere in a
        assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([6, 2], ids["w4"], ids["w3"])
        assert generation["eos_token_id"] == [6, 2]
    else:
        assert (config["eos_token_id"], config["bos_token_id"], config["pad_token_id"]) == ([2, 3], 1, 3)
        assert generation["eos_token_id"] == 2


def test_a_token_that_the_result_lacks_is_no_special_token(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="b", config="a")
    edit_config(tmp_path / "a", pad_token_id=6)
    assert "pad_token_id" not in api.plan(recipe).config


def test_naming_a_model_settles_roles(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="union")
    settings_of_b = tmp_path / "b" / "tokenizer_config.json"
    write_json(settings_of_b, {**json.loads(settings_of_b.read_text()), "bos_token": "</s>", "eos_token": {"content": "w3"}})
    line = refuses(recipe, tmp_path / "out", "'</s>' is the eos_token of base and the bos_token of b: name the model")
    assert "'tokenizer: base'" in line
    assert moerge("plan", write_recipe(tmp_path, experts=("a", "b"), tokenizer="base")).code == 0


def test_ordinary_tokens_that_become_added_ones_are_warned_about(tmp_path: Path) -> None:
    write_model(tmp_path / "base", ["w3"])
    write_model(tmp_path / "a", ["w3", "w4", "w5"], added=["<|x|>"])
    recipe = write_recipe(tmp_path, experts=("a",), tokenizer="union")
    assert api.plan(recipe).warnings == (
        "2 of the tokens that a brings are ordinary ones there: as added tokens they are cut out of any text before it is split, "
        "so the result splits text otherwise than a and base do",
    )
