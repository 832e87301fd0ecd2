"""The tokenizer's and generation's files of a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.checkpoint.companions import code_of, read_companions
from moerge.checkpoint.locate import VOCABULARY_FILES
from moerge.errors import InputError

TEMPLATES = ("chat_template*.jinja", "chat_template*.json", "additional_chat_templates/*.jinja")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
COMPANION_FILES = (
    *VOCABULARY_FILES,
    *SETTINGS,
    *TEMPLATES,
    *("added_tokens.json", "tekken.json", "normalizer.json", "vocab.bpe", "encoder.json", "bpe.codes"),
    *("*.model", "*.tiktoken", "*.spm"),
)
"""What a checkpoint gets from the tokenizer's source, where it exists."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def companion_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer and generation files of a model, by name, with the code that its tokenizer runs by."""
    files = read_companions(folder, COMPANION_FILES)
    return files | code_of(folder, [read_object(files, "tokenizer_config.json").get("auto_map")])


def read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """A JSON object among the files, empty where there is none; InputError for what is none."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {name} as JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{name} should hold a JSON object, not a {type(value).__name__}")
    return value


def write_object(value: Mapping[str, Any]) -> bytes:
    """The content of a file that holds a JSON object."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class NewToken:
    """A token that a tokenizer gets: `text` as its vocabulary spells it, and the entry of tokenizer.json but for the id."""

    text: str
    entry: Mapping[str, Any]


def added_entry(content: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """An added token as tokenizer.json writes it, but for the id; flags that are not given have the library's defaults."""
    defaults = dict.fromkeys(_FLAGS, False) | {"normalized": not flags.get("special", False)}
    return {"content": content, **{flag: bool(flags.get(flag, defaults[flag])) for flag in _FLAGS}}


def next_added_id(tokenizer: bytes, added: Mapping[str, Mapping[str, Any]]) -> int:
    """The id that the tokenizers library gives the next added token: it counts entries, and does not look at their ids."""
    entries = len(json.loads(tokenizer)["model"].get("vocab", ()))
    return max([entries, *(int(token["id"]) + 1 for token in added.values())])


def with_new_tokens(
    files: Mapping[str, bytes], added: Mapping[str, Mapping[str, Any]], tokens: Sequence[NewToken], first: int
) -> dict[str, bytes]:
    """The files of a tokenizer that has these tokens too, as added tokens with ids from `first` on.

    `added` are those that it has already, wherever that is written. Slow tokenizers and converters read added tokens from
    other files than tokenizer.json, so those get them as well. Expects a tokenizer.json.
    """
    changed, new = dict(files), {first + index: token.entry for index, token in enumerate(tokens)}
    tokenizer = json.loads(files["tokenizer.json"])
    written = list(tokenizer.get("added_tokens") or [])
    contents = {token["content"] for token in written}
    # the library numbers added tokens in order, so those that stand elsewhere have to come first
    elsewhere = {
        token["id"]: added_entry(token["content"], token) for token in added.values() if token["content"] not in contents
    }
    written += [{"id": number, **entry} for number, entry in sorted({**elsewhere, **new}.items())]
    changed["tokenizer.json"] = write_object({**tokenizer, "added_tokens": written})
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] |= {str(number): entry for number, entry in new.items()}
        changed["tokenizer_config.json"] = write_object(settings)
    if "added_tokens.json" in files or "tokenizer.model" in files:
        known = json.loads(files.get("added_tokens.json", b"{}"))
        changed["added_tokens.json"] = write_object({**known, **{entry["content"]: number for number, entry in new.items()}})
    return changed
