"""Tokenizer files: read whatever their format, compared by what a token means, and written so that libraries load them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge as api
from moerge.tokenizer import Vocabulary, read_vocabulary, token_ids
from tests.helpers.command import refuses
from tests.helpers.tiny import llama_config, llama_tensors, write_checkpoint, write_json, write_recipe
from tests.helpers.vocabularies import EMBEDDING, HEAD, WIDTH


def write_bpe(folder: Path, vocabulary: dict[str, int], added: dict[str, int] | None = None, **parts: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokens = [{"id": number, "content": text, "special": False} for text, number in (added or {}).items()]
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    write_json(folder / "tokenizer.json", {"version": "1.0", "added_tokens": tokens, "model": model, **parts})
    return folder


def read(folder: Path) -> Vocabulary:
    vocabulary = read_vocabulary(folder)
    assert vocabulary is not None
    return vocabulary


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
BYTES = {"decoder": _BYTE_LEVEL, "pre_tokenizer": _BYTE_LEVEL}
LLAMA_2 = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}]},
}
KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "byte-level": (BYTES, "byte-level", "decoder ByteLevel, pre_tokenizer ByteLevel"),
    "split, then bytes": (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}},
        "byte-level",
        "pre_tokenizer ByteLevel",
    ),
    "llama 2": (LLAMA_2, "metaspace", "decoder Replace, normalizer Replace"),
    "metaspace": ({"pre_tokenizer": {"type": "Metaspace"}}, "metaspace", "pre_tokenizer Metaspace"),
    "wordpiece": ({"decoder": {"type": "WordPiece"}}, "wordpiece", "decoder WordPiece"),
    "clip": ({"decoder": {"type": "BPEDecoder", "suffix": "</w>"}}, "word-end", "decoder BPEDecoder"),
    "none": ({"decoder": None}, "plain", "no decoder that changes them"),
}


@pytest.mark.parametrize("case", KINDS)
def test_how_tokens_are_spelled(tmp_path: Path, case: str) -> None:
    parts, kind, shown = KINDS[case]
    spelling = read(write_bpe(tmp_path, {"a": 0}, **parts)).spelling
    assert (spelling.kind, spelling.shown) == (kind, shown)


@pytest.mark.parametrize(
    ("case", "token", "text"),
    [
        ("byte-level", "Ġhé".replace("é", "Ã©"), " hé"),
        ("byte-level", "Ã", None),
        ("byte-level", "\u2581", None),
        ("llama 2", "\u2581hé", " hé"),
        ("llama 2", "<0x0A>", None),
        ("wordpiece", "##ing", None),
        ("wordpiece", "ing", "ing"),
        ("clip", "ing</w>", None),
        ("none", "a b", "a b"),
    ],
)
def test_the_text_of_a_token(tmp_path: Path, case: str, token: str, text: str | None) -> None:
    spelling = read(write_bpe(tmp_path, {"a": 0}, **KINDS[case][0])).spelling
    assert spelling.literal(token) == text
    if text is not None:
        assert spelling.spell(text) == token


def test_an_added_token_is_the_same_as_an_entry_with_its_text(tmp_path: Path) -> None:
    entry = read(write_bpe(tmp_path / "a", {"ĠĠ": 0, "x": 1}, **BYTES))
    added = read(write_bpe(tmp_path / "b", {"x": 0}, {"  ": 1}, **BYTES))
    assert (entry.ids, added.ids) == ({"ĠĠ": 0, "x": 1}, {"x": 0, "ĠĠ": 1})


def test_an_added_token_takes_over_an_entrys_id(tmp_path: Path) -> None:
    """A reserved token that an expert gave a name."""
    vocabulary = read(write_bpe(tmp_path, {"a": 0, "<reserved>": 1}, {"<|im_start|>": 1}))
    assert (vocabulary.ids, vocabulary.next_id) == ({"a": 0, "<|im_start|>": 1}, 2)


def test_added_tokens_beside_the_vocabulary(tmp_path: Path) -> None:
    write_bpe(tmp_path, {"a": 0})
    write_json(tmp_path / "added_tokens.json", {"<old>": 1, "<both>": 2})
    write_json(
        tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"2": {"content": "<both>"}, "3": {"content": "<new>"}}}
    )
    assert token_ids(tmp_path) == {"a": 0, "<old>": 1, "<both>": 2, "<new>": 3}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"two": {}}})
    with pytest.raises(api.InputError, match=r"tokenizer_config\.json is damaged"):
        token_ids(tmp_path)


def test_older_formats(tmp_path: Path) -> None:
    write_json(tmp_path / "vocab.json", {"a": 0, "Ġa": 1})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    write_json(tmp_path / "added_tokens.json", {" b": 2})
    gpt2 = read(tmp_path)
    assert (gpt2.ids, gpt2.spelling.kind) == ({"a": 0, "Ġa": 1, "Ġb": 2}, "byte-level")
    write_bpe(tmp_path, {"a": 0, "Ġa": 1}, {" b": 2}, **BYTES)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["Ġ", "a"]]
    write_json(tmp_path / "tokenizer.json", tokenizer)
    assert read(tmp_path).splitting["merges"] == gpt2.splitting["merges"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("[UNK]\na\n##b\n")
    bert = read(tmp_path / "bert")
    assert (bert.ids, bert.spelling.kind) == ({"[UNK]": 0, "a": 1, "##b": 2}, "wordpiece")


@pytest.mark.parametrize("number", [-1, 1.5, "1", None, True])
def test_ids_that_are_none(tmp_path: Path, number: object) -> None:
    write_bpe(tmp_path, {"a": 0, "b": number})  # type: ignore[dict-item]
    with pytest.raises(api.InputError, match=r"tokenizer\.json is damaged: fetch or copy it again"):
        token_ids(tmp_path)


def models_with(tmp_path: Path, tokenizers: dict[str, dict[str, Path]], **sections: Any) -> Path:
    """Models of one layer whose tokenizer files are copies of these, and whose row for id i holds i."""
    for name, files in tokenizers.items():
        (tmp_path / name).mkdir()
        for file, source in files.items():
            shutil.copyfile(source, tmp_path / name / file)
        vocabulary = read_vocabulary(tmp_path / name)
        rows = vocabulary.next_id if vocabulary else 32000
        config = llama_config(vocab_size=rows, num_hidden_layers=1)
        tensors = llama_tensors(config)
        for tensor in (EMBEDDING, HEAD):
            tensors[tensor] = np.repeat(np.arange(rows, dtype=np.float32)[:, None], WIDTH, axis=1)
        write_checkpoint(tmp_path / name, tensors, config, dtype="F32", tokenizer=False)
    experts = [name for name in tokenizers if name != "base"]
    return write_recipe(tmp_path, experts=experts, merge={"method": "task_arithmetic", "scale": 1.0}, **sections)


def merged_rows(out: Path) -> np.ndarray:
    from tests.helpers.tiny import read_values

    values = read_values(out)
    assert np.array_equal(values[EMBEDDING], values[HEAD])
    return values[HEAD][:, 0]


def test_published_byte_level_tokenizers(tmp_path: Path, tokenizers_of_others: Path) -> None:
    """GPT-2 in its first format into GPT-NeoX: all ids are what the tokenizers library gives."""
    gpt2, neox = tokenizers_of_others / "gpt2", tokenizers_of_others / "gpt-neox-20b" / "tokenizer.json"
    files = {"base": {"tokenizer.json": neox}, "a": {"vocab.json": gpt2 / "encoder.json", "merges.txt": gpt2 / "vocab.bpe"}}
    recipe = models_with(tmp_path, files, tokenizer="union")
    out = tmp_path / "out"
    result = api.merge(recipe, out, threads=1)
    base, expert, found = (read(folder).ids for folder in (tmp_path / "base", tmp_path / "a", out))
    rows = merged_rows(out)
    assert {text: rows[number] for text, number in found.items()} == {text: expert.get(text, base.get(text)) for text in found}
    warned = "\n".join(result.plan.warnings)
    assert "the result splits text as base does, not as a (merges differ)" in warned
    assert {text: found[text] for text in base} == base
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(out / "tokenizer.json"))
    spelling = read(tmp_path / "a").spelling
    for text in expert:
        literal = spelling.literal(text)
        if text in found and text not in base:
            assert library.token_to_id(literal) == found[text], text
        elif text not in base:  # a part of a character, or text that reads like one in the other's spelling
            assert literal is None or literal in base, text
    assert library.get_vocab_size() == read(out).next_id == len(rows)
    assert "tokens that a brings are ordinary ones there" in warned


def test_published_tokenizers_of_one_ancestor(tmp_path: Path, tokenizers_of_others: Path) -> None:
    """OLMo's tokenizer is GPT-NeoX's with other special tokens: nothing else differs."""
    files = {
        "base": {"tokenizer.json": tokenizers_of_others / "gpt-neox-20b" / "tokenizer.json"},
        "a": {"tokenizer.json": tokenizers_of_others / "olmo" / "tokenizer.json"},
    }
    recipe = models_with(tmp_path, files)
    refuses(
        recipe,
        tmp_path / "out",
        'the vocabularies of base and a differ: only a has "|||IP_ADDRESS|||", "|||EMAIL_ADDRESS|||", "|||PHONE_NUMBER|||"; '
        '"<|endoftext|>" have other ids; say whose tokens to keep',
    )
    planned = api.plan(write_recipe(tmp_path, experts=("a",), tokenizer="union"))
    assert planned.vocabulary["models"]["a"] == {"shared": 50257, "added": 3, "missing": 0, "left_out": 0}
    assert planned.warnings == ()


def test_published_tokenizers_of_other_kinds(tmp_path: Path, tokenizers_of_others: Path) -> None:
    files = {
        "base": {"tokenizer.json": tokenizers_of_others / "gpt-neox-20b" / "tokenizer.json"},
        "a": {"tokenizer.model": tokenizers_of_others / "mistral-v1" / "tokenizer.model"},
    }
    recipe = models_with(tmp_path, files, tokenizer="union")
    refuses(
        recipe, tmp_path / "out", "base is byte-level (decoder ByteLevel, pre_tokenizer ByteLevel), a metaspace (tokenizer.model)"
    )


def test_a_union_is_written_wherever_added_tokens_stand(tmp_path: Path) -> None:
    """Slow tokenizers and converters read other files than tokenizer.json; what stands only there comes first."""
    for name, added in (("base", {}), ("a", {"<x>": 3, " y": 4})):
        folder = write_bpe(tmp_path / name, {"a": 0, "b": 1, "Ġy" if name == "base" else "c": 2}, added, **BYTES)
        config = llama_config(vocab_size=3 + len(added), num_hidden_layers=1)
        write_checkpoint(folder, llama_tensors(config), config, tokenizer=False)
    write_json(tmp_path / "base" / "added_tokens.json", {"<pad>": 3})
    write_json(
        tmp_path / "base" / "tokenizer_config.json", {"added_tokens_decoder": {"3": {"content": "<pad>", "special": True}}}
    )
    out = tmp_path / "out"
    api.merge(write_recipe(tmp_path, experts=("a",), tokenizer="union"), out, threads=1)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    assert [(token["id"], token["content"], token["special"]) for token in tokenizer["added_tokens"]] == [
        (3, "<pad>", True),
        (4, "c", False),
        (5, "<x>", False),
    ]
    assert json.loads((out / "added_tokens.json").read_text()) == {"<pad>": 3, "c": 4, "<x>": 5}
    decoder = json.loads((out / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {number: token["content"] for number, token in decoder.items()} == {"3": "<pad>", "4": "c", "5": "<x>"}
    assert token_ids(out) == {"a": 0, "b": 1, "Ġy": 2, "<pad>": 3, "c": 4, "<x>": 5}
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(out / "tokenizer.json"))
    assert {text: library.token_to_id(text) for text in ("<pad>", "c", "<x>")} == {"<pad>": 3, "c": 4, "<x>": 5}
