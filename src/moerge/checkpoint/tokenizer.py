"""Tokenizer files: whether models agree on token ids, and which files a merged checkpoint gets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moerge.checkpoint.reader import Checkpoint, read_json
from moerge.errors import InputError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model")
COMPANION_FILES = (
    *VOCABULARY_FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "chat_template.json"),
    "generation_config.json",
)
"""What is copied from the tokenizer's source, where it exists."""


def check_same_vocabulary(models: Sequence[Checkpoint]) -> list[str]:
    """Warnings about tokenizers; InputError if two models give the same id to different tokens.

    A merged embedding row is only meaningful where all models mean the same token by it.
    """
    fingerprints = {model.name: _vocabulary_bytes(model.folder) for model in models}
    without = [name for name, files in fingerprints.items() if not files]
    having = [model for model in models if fingerprints[model.name]]
    for model in having[1:]:
        if fingerprints[model.name] != fingerprints[having[0].name]:
            _compare(having[0], model)
    if not having:
        return ["no model has a tokenizer: the merged checkpoint will have none either"]
    return [f"{', '.join(without)}: no tokenizer, assumed to be that of {having[0].name}"] if without else []


def companion_files(folder: Path) -> dict[str, Path]:
    """Tokenizer and generation files to copy, by name."""
    return {name: folder / name for name in COMPANION_FILES if (folder / name).is_file()}


def token_ids(folder: Path) -> dict[str, int] | None:
    """Token text to id, added tokens included; None where only a binary vocabulary is there."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        try:
            vocabulary = tokenizer["model"].get("vocab", {})
            if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of ids
                vocabulary = {piece[0]: index for index, piece in enumerate(vocabulary)}
            return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}}
        except (AttributeError, IndexError, KeyError, TypeError):
            raise InputError(f"{folder / 'tokenizer.json'} is damaged: fetch or copy it again") from None
    if (folder / "vocab.json").is_file():
        return read_json(folder / "vocab.json")
    return None


def _vocabulary_bytes(folder: Path) -> Mapping[str, bytes]:
    return {name: (folder / name).read_bytes() for name in VOCABULARY_FILES if (folder / name).is_file()}


def _compare(first: Checkpoint, second: Checkpoint) -> None:
    ids = {model.name: token_ids(model.folder) for model in (first, second)}
    one, other = ids[first.name], ids[second.name]
    if one is None or other is None:
        raise InputError(
            f"the tokenizers of {first.name} and {second.name} differ and cannot be compared token by token: "
            "give both a tokenizer.json (AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        )
    differing = sorted(token for token in one.keys() | other.keys() if one.get(token) != other.get(token))
    if differing:
        shown = ", ".join(json.dumps(token, ensure_ascii=False) for token in differing[:3])
        more = f" and {len(differing) - 3:,} more" if len(differing) > 3 else ""
        raise InputError(
            f"the tokenizers of {first.name} and {second.name} give different ids to {shown}{more}: "
            "merge only models that share a vocabulary"
        )
