"""The tokenizer's and generation's files of a merged checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.checkpoint.locate import VOCABULARY_FILES
from moerge.files import read_file

COMPANION_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
"""What a checkpoint gets from the tokenizer's source, where it exists."""

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def companion_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer and generation files of a model, by name."""
    return {name: read_file(folder / name) for name in COMPANION_FILES if (folder / name).is_file()}


def has_chat_template(files: Mapping[str, bytes]) -> bool:
    """Whether a model's companion files say how a conversation is written."""
    if any(name.startswith("chat_template") for name in files):
        return True
    return bool(json.loads(files.get("tokenizer_config.json", b"{}")).get("chat_template"))


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
    changed["tokenizer.json"] = _json({**tokenizer, "added_tokens": written})
    settings = json.loads(files.get("tokenizer_config.json", b"{}"))
    if isinstance(settings.get("added_tokens_decoder"), dict):
        settings["added_tokens_decoder"] |= {str(number): entry for number, entry in new.items()}
        changed["tokenizer_config.json"] = _json(settings)
    if "added_tokens.json" in files or "tokenizer.model" in files:
        known = json.loads(files.get("added_tokens.json", b"{}"))
        changed["added_tokens.json"] = _json({**known, **{entry["content"]: number for number, entry in new.items()}})
    return changed


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
