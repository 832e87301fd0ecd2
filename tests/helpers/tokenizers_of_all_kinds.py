"""Tiny tokenizers in every format that models come with, and checkpoints that have nothing else.

byte_level(folder, ["Ġ t", "Ġt he"])                     # all bytes, and what these merges make, in this order
metaspace(folder, {"▁the": -1.0}, bytes_too=True)        # SentencePiece's BPE as tokenizer.json, by score
write_model_file(folder / "tokenizer.model", [...])      # SentencePiece's own file
model(folder, bos_token_id=1)
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moerge.checkpoint.reader import Checkpoint
from moerge.tokenizer.spelling import byte_characters

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPECIAL = ["<unk>", "<s>", "</s>"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE, WORDS = 1, 2, 3


def model(folder: Path, **config: Any) -> Checkpoint:
    return Checkpoint(folder.name, str(folder), folder, config, {})


def tokenizer_json(folder: Path, split_by: Mapping[str, Any], added: Sequence[Mapping[str, Any]] = (), **parts: Any) -> Path:
    folder.mkdir(exist_ok=True)
    written = {"version": "1.0", "added_tokens": list(added), "model": split_by, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(written), encoding="utf-8")
    return folder


def special(number: int, text: str, **flags: bool) -> dict[str, Any]:
    return {"id": number, "content": text, "special": True, **flags}


def byte_level(folder: Path, merges: Sequence[str] = (), added: Sequence[str] = (), **settings: Any) -> Path:
    """Added tokens come first and are special; then the 256 bytes, then what the merges make."""
    texts = [*added, *(byte_characters(bytes([byte])) for byte in range(256)), *(rule.replace(" ", "") for rule in merges)]
    split_by = {"type": "BPE", "vocab": {text: number for number, text in enumerate(texts)}, "merges": list(merges)}
    specials = [special(number, text) for number, text in enumerate(added)]
    return tokenizer_json(folder, split_by, specials, decoder=BYTE_LEVEL, pre_tokenizer=BYTE_LEVEL, **settings)


def pieces_of_text(*texts: str, bytes_too: bool = False) -> list[tuple[str, float, int]]:
    """SentencePiece's three special pieces, those of single bytes if wanted, and these by falling score."""
    pieces = [(SPECIAL[0], 0.0, UNKNOWN), (SPECIAL[1], 0.0, CONTROL), (SPECIAL[2], 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)] if bytes_too else []
    return [*pieces, *((text, -float(rank), NORMAL) for rank, text in enumerate(texts, 1))]


def sentencepiece(
    folder: Path, pieces: Sequence[tuple[str, float, int]], algorithm: int = BPE, name: str = "tokenizer.model"
) -> Path:
    """A tokenizer.model as the library writes it: pieces, then the trainer's settings, with fields that nobody needs."""
    folder.mkdir(exist_ok=True)
    message = b"".join(_bytes(1, _piece(*piece)) for piece in pieces)
    fallback = any(kind == BYTE for _, _, kind in pieces)
    trainer = _bytes(2, b"prefix") + _number(3, algorithm) + _number(4, len(pieces)) + _number(35, int(fallback))
    trainer += _tag(10, 5) + struct.pack("<f", 0.9995) + _tag(99, 1) + struct.pack("<d", 1.0)
    (folder / name).write_bytes(message + _bytes(2, trainer))
    return folder


def _piece(text: str, score: float, kind: int) -> bytes:
    content = _bytes(1, text.encode()) + _tag(2, 5) + struct.pack("<f", score)
    return content if kind == NORMAL else content + _number(3, kind)


def _tag(number: int, wire: int) -> bytes:
    return _varint(number << 3 | wire)


def _number(number: int, value: int) -> bytes:
    return _tag(number, 0) + _varint(value)


def _bytes(number: int, content: bytes) -> bytes:
    return _tag(number, 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
