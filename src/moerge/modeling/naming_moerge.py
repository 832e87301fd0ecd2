"""Tensor names of the sequence-routed model: a dense name with the expert's number after the module that holds it.

    model.layers.3.mlp.gate_proj.weight  <->  model.layers.3.mlp.{expert}.gate_proj.weight

A shared module is expert 0 of one. This file needs neither torch nor moerge.
"""

from __future__ import annotations

import re

ROLES = ("ffn", "attention", "norm", "embedding", "head")
"""What can be kept separate, an expert each, or shared."""

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""Model types that experts may have, and the prefix of their classes in transformers.

A family fits if its decoder layer is `h += self_attn(input_layernorm(h)); h += mlp(post_attention_layernorm(h))` and nothing
else is done between the embedding, the layers, the final norm and the head.
"""

_ROLE_OF_MODULE = {
    "embed_tokens": "embedding",
    "input_layernorm": "norm",
    "self_attn": "attention",
    "post_attention_layernorm": "norm",
    "mlp": "ffn",
    "norm": "norm",
    "lm_head": "head",
}
_HOLDER = (
    r"(?P<holder>(?:model\.(?:layers\.(?P<layer>\d+)\.)?)?"
    r"(?P<module>embed_tokens|input_layernorm|self_attn|post_attention_layernorm|mlp|norm|lm_head))"
)
_DENSE = re.compile(_HOLDER + r"\.(?P<rest>\D.*)")
_SEPARATE = re.compile(_HOLDER + r"\.(?P<expert>\d+)\.(?P<rest>\D.*)")


def separate_name(dense_name: str, expert: int) -> str:
    """The name under which the sequence-routed model stores this tensor of expert number `expert` (0 when shared)."""
    match = _match(_DENSE, dense_name)
    return f"{match['holder']}.{expert}.{match['rest']}"


def dense_name(name: str) -> tuple[str, int]:
    """The inverse of `separate_name`: the dense name and the expert's number."""
    match = _match(_SEPARATE, name)
    return f"{match['holder']}.{match['rest']}", int(match["expert"])


def role_of(dense_name: str) -> str:
    """Return the one of ROLES that a dense tensor has."""
    return _ROLE_OF_MODULE[_match(_DENSE, dense_name)["module"]]


def layer_of(dense_name: str) -> int | None:
    """The layer that a dense tensor is in; None for the embedding, the final norm and the head."""
    layer = _match(_DENSE, dense_name)["layer"]
    return None if layer is None else int(layer)


def _match(pattern: re.Pattern[str], name: str) -> re.Match[str]:
    match = pattern.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no tensor of a dense model that the sequence-routed model can be made of")
    return match
