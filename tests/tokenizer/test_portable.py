"""tokenizer_config.json as transformers 4 reads it too, and otherwise byte for byte what it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moerge.merging.pipeline import merge
from moerge.tokenizer.portable import portable_tokenizer
from tests.helpers.tiny import make_models, write_json, write_recipe

NEW = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>", "<b>"], "model_max_length": 9}
OLD = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 9, "additional_special_tokens": ["<a>", "<b>"]}


def rewritten(settings: object) -> object:
    files = {"tokenizer_config.json": json.dumps(settings).encode(), "tokenizer.json": b"{}"}
    made = portable_tokenizer(files)
    assert made["tokenizer.json"] == b"{}"
    return json.loads(made["tokenizer_config.json"])


def test_what_transformers_5_renamed_gets_its_older_name() -> None:
    assert rewritten(NEW) == OLD
    assert rewritten({**NEW, "additional_special_tokens": ["<b>", "<c>"]}) == {
        **OLD,
        "additional_special_tokens": ["<b>", "<c>", "<a>"],
    }


@pytest.mark.parametrize(
    "content",
    [
        b'{"tokenizer_class":   "LlamaTokenizer"}',
        b'{ "extra_special_tokens": {"image": "<i>"} }',
        b"[1]",
        b"no JSON",
        json.dumps(OLD).encode(),
    ],
)
def test_everything_else_stays_as_it_is(content: bytes) -> None:
    assert portable_tokenizer({"tokenizer_config.json": content}) == {"tokenizer_config.json": content}
    assert portable_tokenizer({}) == {}


def test_merged_checkpoints_have_it(tmp_path: Path) -> None:
    for folder in make_models(tmp_path, experts=("math", "code")).values():
        write_json(folder / "tokenizer_config.json", NEW)
    merge(write_recipe(tmp_path, experts=("math", "code")), tmp_path / "out", threads=1)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == OLD


def test_the_tokenizer_is_the_same_to_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs moerge[models]")
    folder = make_models(tmp_path, experts=("math",))["math"]
    seen = []
    for settings in ({**NEW, "extra_special_tokens": ["<pad>"], "bos_token": "<s>"}, None):
        if settings is None:
            files = {"tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes()}
            (folder / "tokenizer_config.json").write_bytes(portable_tokenizer(files)["tokenizer_config.json"])
        else:
            write_json(folder / "tokenizer_config.json", settings)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        seen.append((tokenizer.encode("w5 <pad> w9"), tokenizer.all_special_tokens, tokenizer.model_max_length, len(tokenizer)))
    assert seen[0] == seen[1]
    assert seen[0][1] == ["<s>", "<pad>"]
