"""Splitting a given text into a tokenizer's tokens, by its model alone.

A tokenizer's normalizer, pre-tokenizer and templates are left out: they would put a space before the text, or cut off the one
that it begins with. The tokenizers library does the work, whatever the algorithm (BPE, Unigram, WordPiece, WordLevel).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moerge.checkpoint.reader import read_json
from moerge.errors import InputError
from moerge.extras import require
from moerge.files import read_file
from moerge.tokenizer.sentencepiece_model import read_sentencepiece
from moerge.tokenizer.spelling import byte_characters
from moerge.tokenizer.surfaces import Tokens

_MOST_PIECES = 1024
"""A token of more pieces is taken for none: only damage makes such a text one token."""


class Splitter:
    """The tokenizer of the model called `name`, for splitting texts into tokens that have a row."""

    def __init__(self, name: str, folder: Path, tokens: Tokens) -> None:
        self._tokens, self._kind = tokens, tokens.vocabulary.spelling.kind
        model, path = _model(folder)
        require("models", f"composing the tokens that {name} lacks of its own", "tokenizers")
        from tokenizers import Tokenizer

        try:
            self._model = Tokenizer.from_str(json.dumps({"version": "1.0", "model": {**model, "dropout": None}})).model
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"the tokenizers library cannot read {path}: {error}; fetch or copy it again") from None
        self._unknown = _unknown(model)

    def split(self, surfaces: Sequence[bytes]) -> list[int] | None:
        """The ids of the tokens that together are the first of these texts that can be split; None if none can."""
        for surface in filter(None, surfaces):
            for text in self._spelled(surface):
                found = self._pieces(text)
                if found is not None and self._covers(found, surface):
                    return found
        return None

    def _spelled(self, surface: bytes) -> Iterator[list[str]]:
        """Ways to write a text down as the model's words, each split by itself; bytes that are no text as pieces of their own."""
        if self._kind == "byte-level":
            yield [byte_characters(surface)]
        elif self._kind == "metaspace":
            text = surface.decode("utf-8", "surrogateescape").replace(" ", "\u2581")
            yield [part for part in re.split("([\udc80-\udcff])", text) if part]
        else:
            text = surface.decode("utf-8", "replace")
            if "\ufffd" not in text:
                yield [text]
                yield text.split()

    def _pieces(self, words: Sequence[str]) -> list[int] | None:
        texts: list[str] = []
        for word in words:
            if "\udc80" <= word[0] <= "\udcff":
                texts.append(f"<0x{ord(word) - 0xDC00:02X}>")
                continue
            tokens = self._model.tokenize(word)
            if any(token.id == self._unknown for token in tokens):
                return None
            texts += [token.value for token in tokens]
        # by text, not by the model's id: where an added token has the same text, that is what the tokenizer makes of it
        found = [self._tokens.vocabulary.ids.get(text, -1) for text in texts]
        return found if 0 < len(found) <= _MOST_PIECES and all(number in self._tokens.surfaces for number in found) else None

    def _covers(self, found: Sequence[int], surface: bytes) -> bool:
        """Return whether the pieces are the whole text: models without a token for what is unknown leave characters out."""
        texts = [self._tokens.surfaces[number] for number in found]
        if self._kind in ("byte-level", "metaspace"):
            return b"".join(text[0] for text in texts) == surface
        return b"".join(text[-1] for text in texts).replace(b" ", b"") == surface.replace(b" ", b"")


def _model(folder: Path) -> tuple[dict[str, Any], Path]:
    """A tokenizer's model as tokenizer.json writes it, and the file that it is from: the one that `read_vocabulary` reads."""
    path = folder / "tokenizer.json"
    if path.is_file():
        return dict(read_json(path)["model"]), path
    path = folder / "vocab.json"
    if path.is_file():
        return {"type": "BPE", "vocab": read_json(path), "merges": _merges(folder / "merges.txt")}, path
    path = folder / "vocab.txt"
    if path.is_file():
        vocabulary = {line: number for number, line in enumerate(read_file(path).decode("utf-8", "replace").splitlines())}
        settings = {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
        return {"type": "WordPiece", "vocab": vocabulary, **settings}, path
    path = next(folder / name for name in ("tokenizer.model", "spiece.model") if (folder / name).is_file())
    return read_sentencepiece(path).as_json(), path


def _merges(path: Path) -> list[str]:
    try:
        lines = read_file(path).decode("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(
            f"{path} is missing or damaged: without it no text can be split into the tokens beside it", code="damaged-file"
        ) from None
    return [line for line in lines if line.strip() and not line.startswith("#version")]


def _unknown(model: dict[str, Any]) -> int | None:
    """The id of the token for what cannot be split."""
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    unknown = model.get("unk_token")
    return None if unknown is None else dict(model["vocab"]).get(unknown)
