"""Vocabularies that cannot be reconciled, and what changes with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import moerge as api
from moerge.checkpoint.reader import open_folder
from moerge.methods.method import merge_method
from moerge.operations.operations import Merge
from moerge.planning.vocab.alignment import Alignment
from moerge.tensors.source import Source
from tests.helpers.command import refuses
from tests.helpers.tiny import edit_config, read_values, write_json, write_recipe, write_tokenizer
from tests.helpers.vocabularies import EMBEDDING, HEAD, SPECIAL, differing, padded, row, value, write_model


def test_other_splitting_is_warned_about(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="base")
    path = tmp_path / "a" / "tokenizer.json"
    write_json(path, {**json.loads(path.read_text()), "normalizer": {"type": "NFC"}})
    assert api.plan(recipe).warnings == ("the result splits text as base does, not as a (normalizer differ)",)


def test_tokenizers_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        recipe = differing(tmp_path, tokenizer="union")
        path = tmp_path / "b" / "tokenizer.json"
        kinds = {"a": {"decoder": {"type": "ByteLevel"}}, "b": {"pre_tokenizer": {"type": "Metaspace"}}}
        tokenizer = {**json.loads(path.read_text()), **kinds[name]}
        tokenizer["model"]["vocab"]["extra"] = 5
        write_json(path, tokenizer)
        kind = {"a": "byte-level (decoder ByteLevel)", "b": "metaspace (pre_tokenizer Metaspace)"}[name]
        message = f"base is plain (no decoder that changes them), b {kind}; such models have no common ancestor"
        refuses(recipe, tmp_path / "out", "the tokenizers of base and b are of different kinds", message)


def test_a_union_needs_a_tokenizer_json_without_gaps(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="union")
    path = tmp_path / "base" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["w4"] = 9
    write_json(path, tokenizer)
    edit_config(tmp_path / "base", vocab_size=5)
    refuses(recipe, tmp_path / "out", "tokenizer: union: the ids of base's tokens have gaps")
    vocabulary = dict(zip([*SPECIAL, "w3", "w4"], range(5), strict=True))
    path.unlink()
    write_json(path.with_name("vocab.json"), vocabulary)
    refuses(recipe, tmp_path / "out", "tokenizer: union adds tokens to the tokenizer.json of base, which has none")


def test_an_id_far_beyond_the_embedding(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="base")
    path = tmp_path / "a" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["w4"] = 10**12
    write_json(path, tokenizer)
    message = "a: the tokenizer gives a token the id 1,000,000,000,000, far beyond the embedding's 7 rows"
    refuses(recipe, tmp_path / "out", message)


def test_sizes_that_differ_without_a_tokenizer(tmp_path: Path) -> None:
    recipe = padded(tmp_path, base=8)
    for name in ("base", "a", "b"):
        (tmp_path / name / "tokenizer.json").unlink()
    refuses(
        recipe, tmp_path / "out", "vocab_size differs (base: 8, a: 6, b: 6) and no model has a tokenizer to match the rows by"
    )


def test_a_model_without_a_tokenizer_cannot_give_one(tmp_path: Path) -> None:
    recipe = padded(tmp_path)
    (tmp_path / "a" / "tokenizer.json").unlink()
    named = write_recipe(tmp_path, experts=("a", "b"), tokenizer="a")
    refuses(named, tmp_path / "out", "tokenizer: a has no tokenizer files: name another model (base, b)")
    (tmp_path / "base" / "tokenizer.json").unlink()
    api.merge(recipe if recipe != named else write_recipe(tmp_path, experts=("a", "b")), tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_vocabularies_that_cannot_be_read(tmp_path: Path) -> None:
    recipe = padded(tmp_path, base=8)
    for name in ("base", "a", "b"):
        (tmp_path / name / "tokenizer.json").rename(tmp_path / name / "tokenizer.model")
    refuses(recipe, tmp_path / "out", "is not a SentencePiece model: give the checkpoint a tokenizer.json")
    for name in ("base", "a", "b"):
        (tmp_path / name / "tokenizer.model").rename(tmp_path / name / "merges.txt")
    api.merge(recipe, tmp_path / "out", threads=1)  # the same vocabulary, whatever it is: rows are matched by position
    assert np.array_equal(read_values(tmp_path / "out")[EMBEDDING][7], value("base", EMBEDDING, "padding 1"))
    (tmp_path / "b" / "merges.txt").write_text("a b")
    parts = ("that of base, a, b cannot be compared token by token", "give it a tokenizer.json", "save_pretrained")
    refuses(recipe, tmp_path / "other", *parts)


def test_families_that_moerge_does_not_know(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="union")
    for name in ("base", "a", "b"):
        edit_config(tmp_path / name, model_type="novel")
    api.merge(recipe, tmp_path / "out", threads=1)
    for tensor in (EMBEDDING, HEAD):
        assert np.array_equal(row(tmp_path / "out", tensor, "<|im_end|>"), value("a", tensor, "<|im_end|>"))
    for name, rows in {"base": 5, "a": 7, "b": 5}.items():
        _rename(tmp_path / name, HEAD, "strange.weight")
        assert read_values(tmp_path / name)["strange.weight"].shape == (rows, 16)
    refuses(
        recipe, tmp_path / "other", "tensor 'strange.weight' has as many rows as there are tokens: whether its rows are tokens"
    )
    for name in ("base", "a", "b"):
        _rename(tmp_path / name, EMBEDDING, None)
        _rename(tmp_path / name, "strange.weight", None)
    refuses(recipe, tmp_path / "other", "no tensor of base is known to have a row for each token")


def _rename(folder: Path, name: str, other: str | None) -> None:
    from tests.helpers.tiny import write_safetensors

    tensors = {other if key == name else key: array for key, array in read_values(folder).items()}
    write_safetensors(folder / "model.safetensors", {key: array for key, array in tensors.items() if key is not None})


def test_a_changed_tokenizer_is_another_plan(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="base")
    before = api.plan(recipe).fingerprint
    write_tokenizer(tmp_path / "b", [*SPECIAL, "w4", "w3"])
    between = api.plan(recipe).fingerprint
    write_json(tmp_path / "base" / "generation_config.json", {"top_p": 0.5})
    assert len({before, between, api.plan(recipe).fingerprint}) == 3


def test_what_was_planned_is_written(tmp_path: Path) -> None:
    recipe = differing(tmp_path, tokenizer="a")
    planned, content = api.plan(recipe), (tmp_path / "a" / "tokenizer.json").read_bytes()
    (tmp_path / "a" / "tokenizer.json").unlink()
    api.merge(planned, tmp_path / "out", threads=1)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content


def test_statistics_of_missing_rows_are_zero(tmp_path: Path) -> None:
    """Those with a row for each token move with it, those of another shape stay."""
    write_model(tmp_path / "a", ["w3", "w4"], dtype="F32")
    write_model(tmp_path / "b", ["w3", "w4"], dtype="F32")
    models = {name: open_folder(tmp_path / name, name=name) for name in ("a", "b")}
    rows = {"a": np.array([4, -1, 3], np.int32), "b": np.array([4, 3, -1], np.int32)}
    alignment = Alignment("a", models, rows, frozenset([HEAD]), frozenset())
    heads = tuple(Source(name, model.tensors[HEAD]) for name, model in models.items())
    other = Source("b", models["b"].tensors["model.norm.weight"])
    merge = Merge(merge_method("average")(), heads, (1.0, 1.0), extras=(heads[0], other))
    moved, same = alignment.aligned(merge, HEAD).extras
    assert moved is not None and same is other
    read = moved.tensor.open().read(0, np.empty(3 * 16, np.float32)).reshape(3, 16)
    assert np.array_equal(read, [value("a", HEAD, "w4", "F32"), np.zeros(16, np.float32), value("a", HEAD, "w3", "F32")])
