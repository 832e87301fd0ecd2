"""The facts that decide whether an inference engine runs a checkpoint: its config and its tokenizer, planned or on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moerge.architecture.registry import read_config
from moerge.checkpoint.reader import read_json
from moerge.tokenizer import companion_files

_SENTENCEPIECE = "tokenizer.model"
_LAYERS_OF_27B = {"gemma2": 46, "gemma3_text": 62}
"""By their number of layers llama.cpp tells the largest Gemmas, whose attention is scaled in another way."""


@dataclass(frozen=True)
class Result:
    """A checkpoint's normalized config, its tokenizer's files by name, and whether the recipe joins vocabularies."""

    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    joined: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any], files: Mapping[str, bytes], *, joined: bool = False) -> Result:
        """From config.json as it is or will be written."""
        return cls(read_config(config)[1], files, joined)

    @classmethod
    def in_folder(cls, folder: Path) -> Result:
        """From a checkpoint on disk; InputError where it has no readable config.json."""
        return cls.of(read_json(folder / "config.json"), companion_files(folder))

    @property
    def model_type(self) -> str:
        """config.json's `model_type`."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def tokenizer(self) -> str:
        """Return the tokenizer's algorithm: "sentencepiece", "bpe", "byte-level bpe", another name, or "" for none.

        "bpe" is what falls back to bytes, as Llama 2's does.
        """
        if _SENTENCEPIECE in self.files:
            return "sentencepiece"
        if "tokenizer.json" not in self.files:
            return "byte-level bpe" if {"vocab.json", "merges.txt"} <= set(self.files) else ""
        try:
            model = json.loads(self.files["tokenizer.json"])["model"]
            kind = model.get("type", "BPE")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return ""
        if kind != "BPE":
            return str(kind)
        return "bpe" if model.get("byte_fallback") else "byte-level bpe"

    @property
    def tokenizer_class(self) -> str:
        """Return the class in tokenizer_config.json, "" if it names none."""
        try:
            settings = json.loads(self.files.get("tokenizer_config.json", b"{}"))
        except ValueError:
            return ""
        return str(settings.get("tokenizer_class") or "") if isinstance(settings, dict) else ""

    @property
    def experts(self) -> int:
        """Experts of each layer, 0 in a dense model."""
        found = self.config.get("num_local_experts") or self.config.get("num_experts") or 0
        return found if isinstance(found, int) else 0

    @property
    def top_k_below_all(self) -> bool:
        """Return whether some experts are left out for a token, so that renormalising their probabilities matters."""
        top_k = self.config.get("num_experts_per_tok")
        return isinstance(top_k, int) and top_k < self.experts

    @property
    def window(self) -> int | None:
        """Return the attention window of the layers where it is limited, None where it reaches every position."""
        window = self.config.get("sliding_window")
        if not isinstance(window, int) or self.config.get("use_sliding_window") is False:
            return None
        kinds = self.config.get("layer_types")
        if isinstance(kinds, list) and "sliding_attention" not in kinds:
            return None
        positions = self.config.get("max_position_embeddings")
        return None if isinstance(positions, int) and window >= positions else window

    @property
    def odd_heads(self) -> bool:
        """Return whether the heads together are wider or narrower than the model."""
        heads, width, hidden = (self.config.get(key) for key in ("num_attention_heads", "head_dim", "hidden_size"))
        return isinstance(heads, int) and isinstance(width, int) and heads * width != hidden

    @property
    def odd_attention_scale(self) -> bool:
        """Return whether a Gemma's attention is scaled by something else than its heads' width, or in a 27B the width over
        the heads.
        """
        keys = ("query_pre_attn_scalar", "head_dim", "hidden_size", "num_attention_heads", "num_hidden_layers")
        scalar, width, hidden, heads, layers = (self.config.get(key) for key in keys)
        if not isinstance(hidden, int) or not isinstance(heads, int) or scalar is None:
            return False
        return bool(scalar != (hidden // heads if layers == _LAYERS_OF_27B.get(self.model_type) else width))

    @property
    def rope_type(self) -> str:
        """The kind of rope scaling, "default" where there is none."""
        scaling = self.config.get("rope_scaling")
        return str(scaling.get("rope_type", "default")) if isinstance(scaling, Mapping) else "default"
