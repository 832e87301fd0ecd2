"""Tokenizers of models, and text as the tokens that they know."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.texts import Document, encode

MAX_CHARS_PER_TOKEN = 20
"""Characters that a token has at most, on average."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder that may hold a model of our own architecture; no code in it is run."""
    from moerge.modeling import register
    from moerge.runtime import loading

    with suppress(ImportError):  # an older transformers reads the tokenizer of all others
        register()
    return loading.load_tokenizer(folder)


def encode_checked(tokenizer: Any, document: Document, limit: int, rows: int, expert: str) -> np.ndarray:
    """The first `limit` tokens of a text or conversation, int64; InputError for one beyond the embedding's rows."""
    some = document[: limit * MAX_CHARS_PER_TOKEN] if isinstance(document, str) else document
    ids = np.asarray(encode(tokenizer, some, limit), np.int64)
    if ids.size and ids.max() >= rows:
        raise InputError(f"calibration.{expert}: token {ids.max()} has no embedding: the tokenizer and the model do not fit")
    return ids
