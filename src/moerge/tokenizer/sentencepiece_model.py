"""SentencePiece's tokenizer.model: its pieces, and the same model as tokenizer.json would hold it.

The file is a protocol buffer (google/sentencepiece, `src/sentencepiece_model.proto`). Few of its fields are needed, so that
neither sentencepiece nor protobuf has to be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.files import read_file

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_PIECES, _TRAINER = 1, 2
_TEXT, _SCORE, _TYPE = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK = 3, 35
_UNIGRAM, _BPE = 1, 2
_NAMES = {_UNIGRAM: "Unigram", _BPE: "BPE", 3: "words", 4: "characters"}


@dataclass(frozen=True)
class SentencePieceModel:
    """A tokenizer.model: `texts`, `scores` and `types` of its pieces by id, and whether bytes stand in for unknown characters."""

    file: Path
    texts: tuple[str, ...] = field(repr=False)
    scores: tuple[float, ...] = field(repr=False)
    types: tuple[int, ...] = field(repr=False)
    algorithm: int
    byte_fallback: bool

    @property
    def added(self) -> dict[str, dict[str, Any]]:
        """Pieces that no text is split into, as tokenizer.json's entries of added tokens, and those that a user defined."""
        kinds = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}
        return {
            text: {"id": number, "content": text.replace("\u2581", " "), "special": kinds[kind], "normalized": False}
            for number, (text, kind) in enumerate(zip(self.texts, self.types, strict=True))
            if kind in kinds
        }

    @property
    def unknown(self) -> str | None:
        """The piece for what cannot be split."""
        return next((text for text, kind in zip(self.texts, self.types, strict=True) if kind == _UNKNOWN), None)

    def as_json(self) -> dict[str, Any]:
        """The `model` of a tokenizer.json; InputError for models of whole words or characters, which that has no name for."""
        if self.algorithm == _UNIGRAM:
            unknown = None if self.unknown is None else self.texts.index(self.unknown)
            vocabulary = [list(piece) for piece in zip(self.texts, self.scores, strict=True)]
            return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": self.byte_fallback}
        if self.algorithm == _BPE:
            ids = {text: number for number, text in enumerate(self.texts)}
            settings = {"unk_token": self.unknown, "fuse_unk": True, "byte_fallback": self.byte_fallback}
            return {"type": "BPE", **settings, "vocab": ids, "merges": self._merges(ids)}
        raise InputError(
            f"{self.file} splits text into {_NAMES.get(self.algorithm, 'something unknown')}: only BPE and Unigram models "
            "can be mapped to another tokenizer's tokens"
        )

    def _merges(self, ids: Mapping[str, int]) -> list[tuple[str, str]]:
        """Merge rules by falling score; two that give the same piece in the order of their parts (transformers' converter)."""
        rules: list[tuple[float, str, str]] = []
        for text, score, kind in zip(self.texts, self.scores, self.types, strict=True):
            if kind in (_NORMAL, _USER_DEFINED):
                pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in ids and text[cut:] in ids]
                pairs.sort(key=lambda pair: (ids[pair[0]], ids[pair[1]]))
                rules += [(-score, left, right) for left, right in pairs]
        rules.sort(key=lambda rule: rule[0])  # stable: rules of one score stay in the order of their pieces
        return [(left, right) for _, left, right in rules]


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """A tokenizer.model; InputError if the file is something else or damaged."""
    content = read_file(path)
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    try:
        for number, value in _fields(memoryview(content)):
            if number == _PIECES:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(_SCORE, b"\0\0\0\0"))[0]
                pieces.append((str(piece[_TEXT], "utf-8"), score, int(piece.get(_TYPE, _NORMAL))))
            elif number == _TRAINER:
                trainer |= dict(_fields(value))
        algorithm, fallback = int(trainer.get(_MODEL_TYPE, _UNIGRAM)), bool(trainer.get(_BYTE_FALLBACK, 0))
        if not pieces:
            raise ValueError("no pieces")
    except (KeyError, TypeError, ValueError, struct.error):  # UnicodeDecodeError is a ValueError
        raise InputError(
            f"{path} is not a SentencePiece model: give the checkpoint a tokenizer.json "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)"
        ) from None
    texts, scores, types = zip(*pieces, strict=True)
    return SentencePieceModel(path, texts, scores, types, algorithm, fallback)


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """A message's fields: their numbers, and values as integers (varints) or bytes. ValueError where it is damaged."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(message, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > len(message):
            raise ValueError("truncated")
        yield number, message[position : position + length]
        position += length


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a damaged number")
