"""Tiny Llamas whose vocabularies differ: the rows of embedding and head depend on the model and the token's text alone.

write_model(tmp_path / "base", ["w3", "w4"])                        # ids follow the order; three special tokens come first
write_model(tmp_path / "chat", ["w4", "w3"], added=["<|im_end|>"], rows=64)
row(tmp_path / "out", "lm_head.weight", "<|im_end|>")               # a merged checkpoint's row by text
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerge.tensors.dtypes import DTYPES
from moerge.tokenizer import token_ids
from tests.helpers.tiny import (
    decode,
    encode,
    llama_config,
    llama_tensors,
    read_values,
    write_checkpoint,
    write_json,
    write_recipe,
    write_tokenizer,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WIDTH = 16


def value(model: str, tensor: str, text: str, dtype: str = "BF16") -> np.ndarray:
    """What a model stores for a token, as float32."""
    rng = np.random.default_rng([zlib.crc32(part.encode("utf-8", "surrogatepass")) for part in (model, tensor, text)])
    drawn = rng.standard_normal(WIDTH, dtype=np.float32)
    return decode(encode(drawn, DTYPES[dtype]), DTYPES[dtype])


def write_model(
    folder: Path,
    tokens: Sequence[str],
    *,
    added: Sequence[str] = (),
    rows: int | None = None,
    tied: bool = False,
    dtype: str = "BF16",
    expert: int | None = None,
    **config: Any,
) -> Path:
    """A Llama whose tokens are SPECIAL, `tokens` and `added` ones, in this order, with `rows` in its embedding."""
    everything = [*SPECIAL, *tokens, *added]
    rows = rows or len(everything)
    whole = llama_config(vocab_size=rows, tie_word_embeddings=tied, **config)
    tensors = llama_tensors(whole, expert=expert)
    for name in (EMBEDDING, HEAD):
        if name in tensors:
            texts = [*everything, *(f"padding {index}" for index in range(rows))][:rows]
            tensors[name] = np.stack([value(folder.name, name, text, dtype) for text in texts])
    write_checkpoint(folder, tensors, whole, dtype=dtype, tokenizer=False)
    write_tokenizer(folder, [*SPECIAL, *tokens])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for number, text in enumerate(added, len(SPECIAL) + len(tokens)):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": text})
    write_json(folder / "tokenizer.json", tokenizer)
    return folder


def row(folder: Path, tensor: str, text: str) -> np.ndarray:
    """The row of a token in a checkpoint, as float32."""
    ids = token_ids(folder)
    assert ids is not None
    return read_values(folder)[tensor][ids[text]]


def padded(tmp_path: Path, **rows: int) -> Path:
    """A recipe of three models with one vocabulary, of which those that `rows` names have more rows."""
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, ["w3", "w4", "w5"], rows=rows.get(name))
    return write_recipe(tmp_path, experts=("a", "b"))


def differing(tmp_path: Path, **sections: Any) -> Path:
    """A recipe of a base, an expert with two more tokens in another order, and one like the base."""
    write_model(tmp_path / "base", ["w3", "w4"])
    write_model(tmp_path / "a", ["w4", "w3"], added=["<|im_start|>", "<|im_end|>"])
    write_model(tmp_path / "b", ["w3", "w4"])
    return write_recipe(tmp_path, experts=("a", "b"), **sections)
