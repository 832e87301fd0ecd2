"""Encodings of vocabularies: the same token text means different things in vocabularies that encode differently."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_SPACE = "\u2581"
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PARTS = ("normalizer", "pre_tokenizer", "decoder")


@dataclass(frozen=True)
class TokenEncoding:
    """A way to spell tokens, and `shown`, what in the files says so.

    Entries of a vocabulary are spelled; added tokens stand in the files as the text they match, and `spell` makes the two
    comparable. `kind` is one of

    - "byte-level": every byte is a printable character, a space is U+0120 (GPT-2, Llama 3, Qwen);
    - "metaspace": a space is U+2581, bytes that are no text are `<0x0A>` (SentencePiece: Llama 2, Mistral, Gemma);
    - "wordpiece": `##` continues a word (BERT);
    - "word-end": `</w>` ends a word (CLIP);
    - "plain": as it is.
    """

    kind: str
    shown: str

    def spell(self, text: str) -> str:
        """Write this text as the vocabulary would write it as one token."""
        if self.kind == "byte-level":
            return byte_characters(text.encode("utf-8", "surrogatepass"))
        return text.replace(" ", _SPACE) if self.kind == "metaspace" else text

    def literal(self, token: str) -> str | None:
        """The text that a token stands for; None where it is none by itself, such as a single byte of a longer character."""
        if self.kind == "byte-level":
            content = token_bytes(token)
            try:
                return None if content is None else content.decode("utf-8")
            except UnicodeDecodeError:
                return None
        if self.kind == "metaspace":
            return None if _BYTE_PIECE.fullmatch(token) else token.replace(_SPACE, " ")
        if (self.kind == "wordpiece" and token.startswith("##")) or (self.kind == "word-end" and token.endswith("</w>")):
            return None
        return token


def byte_characters(content: bytes) -> str:
    """Bytes as a byte-level vocabulary spells them."""
    return "".join(map(_CHARACTERS.__getitem__, content))


def token_bytes(token: str) -> bytes | None:
    """The bytes that a byte-level vocabulary's token spells; None where it has other characters."""
    try:
        return bytes(map(_BYTES.__getitem__, token))
    except KeyError:
        return None


def spelling_of(tokenizer: Mapping[str, Any]) -> TokenEncoding:
    """The spelling of a tokenizer.json."""
    marks = [
        (part, step["type"], _kind_of(part, step))
        for part in _PARTS
        for step in steps(tokenizer.get(part))
        if _kind_of(part, step)
    ]
    if not marks:
        kind = tokenizer["model"].get("type")
        if kind == "WordPiece":
            return TokenEncoding("wordpiece", "model WordPiece")
        return TokenEncoding("plain", "no decoder that changes them")
    ranked = sorted(marks, key=lambda mark: mark[0] != "decoder")  # the decoder says best what a token means
    kind = ranked[0][2]
    shown = ", ".join(dict.fromkeys(f"{part} {name}" for part, name, of in ranked if of == kind))
    return TokenEncoding(kind, shown)


def spelling_of_tokens(tokens: Mapping[str, int]) -> TokenEncoding:
    """The spelling of a bare vocab.json, by what is in it."""
    if any(token.startswith("\u0120") for token in tokens):
        return TokenEncoding("byte-level", "tokens with U+0120 for a space")
    if any(token.startswith(_SPACE) for token in tokens):
        return TokenEncoding("metaspace", "tokens with U+2581 for a space")
    return TokenEncoding("plain", "nothing that stands for a space")


def steps(part: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, those inside sequences too."""
    if not isinstance(part, dict):
        return
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if isinstance(part.get(key), list)), None)
    if inner is None:
        if isinstance(part.get("type"), str):
            yield part
        return
    for step in inner:
        yield from steps(step)


def _kind_of(part: str, step: Mapping[str, Any]) -> str:
    name = step["type"]
    if name == "Replace":
        pattern = step.get("pattern")
        texts = [step.get("content"), *(pattern.values() if isinstance(pattern, dict) else ())]
        return "metaspace" if _SPACE in texts else ""
    kinds = {"ByteLevel": "byte-level", "Metaspace": "metaspace", "WordPiece": "wordpiece", "BPEDecoder": "word-end"}
    return kinds.get(name, "")


def _byte_characters() -> dict[int, str]:
    """GPT-2's table (`bytes_to_unicode` in its encoder.py): printable bytes as they are, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(others)}


_CHARACTERS = _byte_characters()
_BYTES = {character: byte for byte, character in _CHARACTERS.items()}
