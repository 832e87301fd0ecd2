"""The bytes of text that a vocabulary's tokens stand for, which compare across vocabularies that encode them differently."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.tokenizer.spelling import token_bytes
from moerge.tokenizer.vocabulary import Vocabulary, has_tokenizer, read_vocabulary, special_tokens

ROLES = ("eos_token", "bos_token", "unk_token", "pad_token")
"""What a token with several of them counts as first: what a model predicts to end a text is told from nothing else."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Tokens:
    """The tokens of a model that have a row, by id.

    `surfaces` are the bytes that a token stands for. Where a vocabulary does not say whether a space belongs to it (words of
    WordPiece and the like), there are two: with the space before it first. `special` are the ids of tokens that stand for no
    text; `roles` the id of each special token by what it is for, such as `bos_token`.
    """

    vocabulary: Vocabulary = field(repr=False)
    surfaces: Mapping[int, tuple[bytes, ...]] = field(repr=False)
    special: frozenset[int]
    roles: Mapping[str, int]

    @cached_property
    def ordinary_ids(self) -> Mapping[bytes, int]:
        """The token of each text, special ones left out. Of several the one that stands for nothing else."""
        texts = self.vocabulary.texts
        ids = [number for number in self.surfaces if number not in self.special]
        return self._by_surface(sorted(ids, key=lambda number: is_byte_piece(texts[number])))

    @cached_property
    def special_ids(self) -> Mapping[bytes, int]:
        """The special token of each text."""
        return self._by_surface(sorted(self.special))

    def role(self, role: str) -> int | None:
        """The token with a role. Where nothing begins texts, that is what ends them: it stands between them."""
        return self.roles.get(role, self.roles.get("eos_token") if role == "bos_token" else None)

    def _by_surface(self, ids: Iterable[int]) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for rank in (0, 1):
            for number in ids:
                if rank < len(self.surfaces[number]):
                    found.setdefault(self.surfaces[number][rank], number)
        return found


def read_tokens(model: Checkpoint, rows: int) -> Tokens:
    """The tokens of a model whose embedding has `rows`; InputError if it has no tokenizer, or one that cannot be read."""
    vocabulary = read_vocabulary(model.folder) if has_tokenizer(model.folder) else None
    if vocabulary is None:
        raise InputError(
            f"{model.name} has no tokenizer whose tokens can be compared with another's: put its tokenizer.json into "
            f"{model.folder}"
        )
    ids = {text: number for text, number in sorted(vocabulary.ids.items(), key=lambda entry: entry[1]) if number < rows}
    surfaces = {number: byte_forms_of(vocabulary, text) for text, number in ids.items()}
    special = frozenset(ids[text] for text, token in vocabulary.added.items() if token.get("special") and text in ids)
    return Tokens(vocabulary, surfaces, special, _roles(model, ids, vocabulary, rows))


def byte_forms_of(vocabulary: Vocabulary, token: str) -> tuple[bytes, ...]:
    """The bytes that a token of a vocabulary stands for; several where a space before it is left open, the likelier first."""
    kind = vocabulary.spelling.kind
    if kind == "metaspace":  # also in added tokens: Gemma's for runs of spaces stand among them
        byte = _BYTE_PIECE.fullmatch(token)
        return (bytes([int(byte[1], 16)]),) if byte else (_utf8(token.replace("\u2581", " ")),)
    if token in vocabulary.added:
        return (_utf8(vocabulary.added[token]["content"]),)
    if kind == "byte-level":
        content = token_bytes(token)
        return (_utf8(token) if content is None else content,)
    if kind == "wordpiece" and token.startswith("##"):
        return (_utf8(token[2:]),)
    if kind in ("wordpiece", "word-end") or vocabulary.whole_words:
        word = token.removesuffix("</w>") if kind == "word-end" else token
        return _utf8(f" {word}"), _utf8(word)
    return (_utf8(token),)


def is_byte_piece(token: str) -> bool:
    """Return whether a token is SentencePiece's for a single byte."""
    return _BYTE_PIECE.fullmatch(token) is not None


def _roles(model: Checkpoint, ids: Mapping[str, int], vocabulary: Vocabulary, rows: int) -> dict[str, int]:
    """Each role's token: what the tokenizer's settings say, else the model's config."""
    found: dict[str, int] = {}
    for role, text in special_tokens(model.folder).items():
        number = ids.get(vocabulary.spelling.spell(text), ids.get(text))
        if number is not None:
            found[role] = number
    inner = model.config.get("text_config")
    for settings in (model.config, inner if isinstance(inner, Mapping) else {}):
        for role in ROLES:
            given: Any = settings.get(f"{role}_id")
            number = given[0] if isinstance(given, list) and given else given
            if type(number) is int and 0 <= number < rows and number in vocabulary.texts:
                found.setdefault(role, number)
    return found


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
