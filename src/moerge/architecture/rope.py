"""Rotary position embeddings in config.json: one normal form, and one that old and new transformers read alike.

Canonical: `rope_theta`, `rope_scaling` (None, or a mapping with `rope_type`), `partial_rotary_factor` where there is one. Where
sliding layers have an embedding of their own (Gemma 3), `rope_local_base_freq` is its base and the others are for full layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LAYER_KINDS = {"full_attention", "sliding_attention"}
_ORIGINAL = "original_max_position_embeddings"


def flatten_rope(found: dict[str, Any]) -> None:
    """Bring a config's rope into its normal form, in place.

    transformers 5 nests everything in `rope_parameters`, 4.x keeps it at the top level; "type" is an old name of "rope_type".
    """
    nested = found.pop("rope_parameters", None)
    if isinstance(nested, Mapping) and "rope_local_base_freq" in found and set(nested) <= _LAYER_KINDS:
        local = nested.get("sliding_attention") or {}
        found["rope_local_base_freq"] = local.get("rope_theta", found["rope_local_base_freq"])
        found["rope_local_scaling"] = _scaling(local)
        nested = nested.get("full_attention") or {}
    scaling = found.get("rope_scaling")
    if isinstance(nested, Mapping) and not any(isinstance(value, Mapping) for value in nested.values()):
        scaling = nested if nested else scaling
        found["rope_theta"] = nested.get("rope_theta", found.get("rope_theta"))
    elif nested is not None:
        found["rope_parameters"] = nested
    if isinstance(scaling, Mapping):
        if "partial_rotary_factor" in scaling:
            found["partial_rotary_factor"] = scaling["partial_rotary_factor"]
        scaling = _scaling(scaling)
    found["rope_scaling"] = scaling


def _scaling(parameters: Mapping[str, Any]) -> dict[str, Any] | None:
    named = {("rope_type" if key == "type" else key): value for key, value in parameters.items()}
    kept = {key: value for key, value in named.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if "mrope_section" in kept:  # Qwen2-VL's sections of the head, which "mrope" is an old name for
        return {**kept, "rope_type": "default" if kept.get("rope_type", "mrope") == "mrope" else kept["rope_type"]}
    return None if kept.get("rope_type", "default") == "default" else kept


def write_rope(written: dict[str, Any], known: Mapping[str, Any], scaling_keys: Mapping[str, str]) -> None:
    """Add a normalized config's rope to a config.json, in place, in every form that some transformers reads.

    `scaling_keys` are the only keys that the family's code in 4.x allows in `rope_scaling`, and its names for them; where that is
    too little to say what is meant, transformers 5 alone is served, which reads `rope_scaling` first.
    """
    theta, scaling, partial = known.get("rope_theta"), known["rope_scaling"], known.get("partial_rotary_factor")
    if theta is None:
        return
    fraction = {} if partial is None else {"partial_rotary_factor": partial}
    entry = {"rope_type": "default", **(scaling or {}), "rope_theta": theta, **fraction}
    old = scaling
    if isinstance(scaling, Mapping):
        old = {key: value for key, value in scaling.items() if not _repeats_default(key, value, known)}
        if scaling_keys and all(key in scaling_keys or (key == _ORIGINAL and old[key] == known.get(key)) for key in old):
            old = {name: old[key] for key, name in scaling_keys.items() if key in old}
    written |= {"rope_theta": theta, "rope_scaling": old, "rope_parameters": entry, **fraction}
    local = known.get("rope_local_base_freq")
    if local is not None:
        sliding = {"rope_type": "default", **(known.get("rope_local_scaling") or {}), "rope_theta": local}
        written["rope_local_base_freq"] = local
        written["rope_parameters"] = {"full_attention": entry, "sliding_attention": sliding}


def _repeats_default(key: str, value: Any, known: Mapping[str, Any]) -> bool:
    """transformers 5 writes the trained length where there was none; 4.x then takes another yarn factor than the one given."""
    return key == _ORIGINAL and known["rope_scaling"].get("rope_type") == "yarn" and value == known.get("max_position_embeddings")


def comparable_scaling(config: Mapping[str, Any]) -> Any:
    """`rope_scaling` without what it only repeats: transformers 5 writes the trained length in it, 4.x mostly did not."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return scaling
    assumed = config.get(_ORIGINAL) or config.get("max_position_embeddings")
    return {key: value for key, value in scaling.items() if key != _ORIGINAL or value != assumed}
