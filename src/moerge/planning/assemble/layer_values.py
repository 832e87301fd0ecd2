"""Values of config.json that belong to layers, for a model with these layers in another order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.errors import InputError

_BY_LAYER = frozenset(
    {
        *("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "layer_rope_theta", "no_rope_layers"),
        *("attention_layers", "attn_layers", "activation_sparsity_pattern", "num_attention_heads_per_layer"),
        *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window", "moe_layer_freq"),
    }
)
"""Keys of lists with a value for each layer."""
_NUMBERS = frozenset(
    {
        *("full_attn_idxs", "moe_layers", "mlp_only_layers", "cross_attention_layers", "hybrid_layer_ids", "attn_layer_indices"),
        *("rope_scaling_layers", "full_attention_layers", "global_attention_layers"),
    }
)
"""Keys of lists of layers' numbers."""
_FIRST = frozenset({"first_k_dense_replace", "num_dense_layers", "moe_first_k_dense_replace", "moe_layer_start_index"})
"""Keys that count layers of a kind from the first on."""
_LAST = frozenset({"num_kv_shared_layers"})
"""Keys that count layers of a kind from the last on."""
_OTHERS = frozenset({"kv_source_layers"})
"""Keys that say how layers depend on others."""


def reordered(config: Mapping[str, Any], written: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The written values that change if a model has the layers `order` of those that it has.

    Args:
        config: The language model's config in normal form, with what its family derives from other values.
        written: The language model's part of config.json.
        order: For each layer of the result, the number of the model's layer that it is.

    Returns:
        New values by key. What is derived is written only where layers differ in it: other values would mean it otherwise.

    Raises:
        InputError: No value says what this order means.
    """
    layers = config["num_hidden_layers"]
    changes: dict[str, Any] = {}
    if list(order) == list(range(layers)):
        return changes
    for key, value in {**config, **written}.items():
        new = _new_value(key, value, order, layers)
        if new is not None and (key in written or _differ(value)):
            changes[key] = new
    return changes


def _new_value(key: str, value: Any, order: Sequence[int], layers: int) -> Any:
    if key in _OTHERS and value:
        raise InputError(f"slices: config.json's {key} says which layers belong together, so they cannot be rearranged")
    if key == "per_layer_config" and isinstance(value, Mapping):
        return {str(new): value[name] for new, old in enumerate(order) for name in (old, str(old)) if name in value}
    if key in _NUMBERS and isinstance(value, list) and all(type(number) is int for number in value):
        return [new for new, old in enumerate(order) if old in value]
    if key in _BY_LAYER and isinstance(value, list) and value:
        return [value[min(old, len(value) - 1)] for old in order] if len(value) >= layers else None
    if type(value) is not int or not 0 < value <= layers:
        return None
    if key in _FIRST:
        return _run(key, [old < value for old in order])
    return _run(key, [old >= layers - value for old in reversed(order)]) if key in _LAST else None


def _run(key: str, members: Sequence[bool]) -> int:
    """The number of layers of a kind, all of which come before the others."""
    count = sum(members)
    if not all(members[:count]):
        end = "last" if key in _LAST else "first"
        raise InputError(f"slices: config.json's {key} counts layers that come {end}, and this order has others there")
    return count


def _differ(value: Any) -> bool:
    return not isinstance(value, list) or any(entry != value[0] for entry in value)
