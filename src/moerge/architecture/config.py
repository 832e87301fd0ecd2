"""config.json in one canonical form for comparing, and in one that old and new transformers read alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.architecture.family import Family

STRUCTURAL = frozenset(
    {
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("num_local_experts", "num_experts"),
    }
)
"""Keys that decide which tensors exist and in what shape: experts must agree on them."""

_HARMLESS = frozenset(
    {
        *("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "auto_map"),
        *("initializer_range", "attention_dropout", "pretraining_tp", "_attn_implementation", "_attn_implementation_autoset"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef"),
        *("chunk_size_feed_forward", "is_encoder_decoder", "moerge", "mergekit", "unsloth_version", "unsloth_fixed"),
    }
)
"""Keys that do not change what a causal forward pass computes."""


def canonical(config: Mapping[str, Any], family: Family | None) -> dict[str, Any]:
    """The config with the family's defaults filled in and rope written one way: `rope_theta`, `rope_scaling`.

    transformers 5 nests both in `rope_parameters`, 4.x keeps them at the top level; "type" is an old name of "rope_type".
    """
    found = {**(family.defaults if family else {}), **config}
    nested = found.pop("rope_parameters", None)
    scaling = found.get("rope_scaling")
    if isinstance(nested, Mapping) and all(not isinstance(value, Mapping) for value in nested.values()):
        scaling = {key: value for key, value in nested.items() if key != "rope_theta"}
        found["rope_theta"] = nested.get("rope_theta", found.get("rope_theta"))
    elif nested is not None:
        found["rope_parameters"] = nested
    if isinstance(scaling, Mapping):
        scaling = {("rope_type" if key == "type" else key): value for key, value in scaling.items()}
        scaling = None if scaling.get("rope_type", "default") == "default" else scaling
    found["rope_scaling"] = scaling
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found.get("num_attention_heads")
    width, heads = found.get("hidden_size"), found.get("num_attention_heads")
    if found.get("head_dim") is None and type(width) is type(heads) is int and heads > 0:
        found["head_dim"] = width // heads
    return found


def portable(config: Mapping[str, Any], *, family: Family | None, dtype: str) -> dict[str, Any]:
    """config.json that transformers 4.5x and 5.x both read right, for tensors of element type `dtype`."""
    written = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")}
    known = canonical(config, family)
    if known.get("rope_theta") is not None:
        scaling = known["rope_scaling"]
        written["rope_theta"], written["rope_scaling"] = known["rope_theta"], scaling
        written["rope_parameters"] = {"rope_type": "default", **(scaling or {}), "rope_theta": known["rope_theta"]}
    written["torch_dtype"] = written["dtype"] = dtype
    return written


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keys on which canonical configs disagree, those that do not matter left out: {key: {model: value}}."""
    keys = sorted({key for config in configs.values() for key in config} - _HARMLESS)
    values = {key: {name: config.get(key) for name, config in configs.items()} for key in keys}
    return {key: by_model for key, by_model in values.items() if _differ(list(by_model.values()))}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])
