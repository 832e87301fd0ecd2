"""The sizes in tensors' shapes, by name, from a normalized config."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_MODULES = 1_000_000
"""More layers times experts than this is a damaged config, which would otherwise fill the memory."""

MAX_LAYERS = 10_000
"""More layers than this are in no model."""

_KEYS = {
    "layers": "num_hidden_layers",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head": "head_dim",
}
_PRODUCTS = {"q": ("heads", "head"), "kv": ("kv_heads", "head")}
_OPTIONAL = {"experts": "num_local_experts", "shared": "shared_expert_intermediate_size"}
"""Sizes that may be nothing."""


class Sizes:
    """`sizes["hidden"]`, and sums such as `sizes["q+2*kv"]`, of a normalized config.

    Dimensions: layers, vocab, positions, hidden, intermediate, heads, kv_heads, head, q (heads * head), kv (kv_heads * head),
    experts, shared; whole numbers; and those that `more` gives a config key for.
    """

    def __init__(self, config: Mapping[str, Any], more: Mapping[str, str]) -> None:
        self._config, self._keys = config, {**_KEYS, **more}
        self._known: dict[str, int] = {}

    def __getitem__(self, expression: str) -> int:
        """Raises ValueError for a size that the config lacks or garbles."""
        if expression not in self._known:
            self._known[expression] = sum(self._term(term) for term in expression.split("+"))
        return self._known[expression]

    def _term(self, term: str) -> int:
        match = re.fullmatch(r"(?:(\d+)\*)?(\w+)", term)
        assert match, term
        factor, name = int(match[1] or 1), match[2]
        if name.isdigit():
            return factor * int(name)
        if name in _PRODUCTS:
            first, second = _PRODUCTS[name]
            return factor * self[first] * self[second]
        if name in _OPTIONAL:
            return factor * (self._size(_OPTIONAL[name]) if self._config.get(_OPTIONAL[name]) else 0)
        return factor * self._size(self._keys[name])

    def _size(self, key: str) -> int:
        value = self._config.get(key)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} should be a positive whole number, not {value!r}")
        return value


def layer_count(config: Mapping[str, Any]) -> int:
    """num_hidden_layers, or 0 where that is nothing sensible; whether it has to be is for `Sizes` to say."""
    layers = config.get("num_hidden_layers")
    return layers if type(layers) is int and 0 < layers <= MAX_MODULES else 0
