"""config.json in one normal form for comparing, and in one that old and new transformers read alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.architecture.family import Family
from moerge.architecture.rope import comparable_scaling, flatten_rope, write_rope

STRUCTURAL = frozenset(
    {
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("num_local_experts", "num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "moe_layers"),
        *("qkv_bias", "add_cross_attention"),
    }
)
"""Keys that decide which tensors exist and in what shape: experts must agree on them."""

_HARMLESS = frozenset(
    {
        *("architectures", "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "auto_map"),
        *("initializer_range", "attention_dropout", "pretraining_tp", "_attn_implementation", "_attn_implementation_autoset"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef"),
        *("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "classifier_dropout", "router_jitter_noise"),
        *("summary_type", "summary_use_proj", "summary_activation", "summary_first_dropout", "summary_proj_to_labels"),
        *("cache_implementation", "task_specific_params", "n_ctx", "is_decoder"),
        *("chunk_size_feed_forward", "is_encoder_decoder", "moerge", "mergekit", "unsloth_version", "unsloth_fixed"),
    }
)
"""Keys that do not change what a causal forward pass computes."""

_OF_THE_WHOLE = frozenset({"model_type", "architectures", "auto_map", "tie_word_embeddings", "dtype", "torch_dtype"})
"""Keys that a config of several models answers for all of them; of others the language model's part counts, as it does where
transformers makes the model (PaliGemma's config has another `hidden_size` outside)."""


def normalized_config(config: Mapping[str, Any], family: Family | None) -> dict[str, Any]:
    """The config in one form, whoever wrote it: other families' names for keys, the family's defaults and what its code
    derives filled in, rope as `rope_theta` and `rope_scaling`, a nested language model's config among its own keys.
    """
    own, nested = dict(config), nested_key(config, family)
    if nested:
        inner = own.pop(nested, None)
        language = inner.items() if isinstance(inner, Mapping) else ()
        own |= {key: value for key, value in language if key not in own or (key not in _OF_THE_WHOLE and value is not None)}
    if family is not None:
        own = {**family.defaults, **{family.keys.get(key, key): value for key, value in own.items()}}
    flatten_rope(own)
    if own.get("num_key_value_heads") is None:
        own["num_key_value_heads"] = own.get("num_attention_heads")
    width, heads = own.get("hidden_size"), own.get("num_attention_heads")
    if own.get("head_dim") is None and type(width) is type(heads) is int and heads > 0:
        own["head_dim"] = width // heads
    if family is not None:
        family.derive(own)
    return own


_LANGUAGE_PARTS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")
"""Where configs of several models have the language model's, in families that moerge does not know."""


def nested_key(config: Mapping[str, Any], family: Family | None) -> str:
    """The key of the language model's config in a config of several models, "" where there is none."""
    if family is not None:
        return family.nested
    return next((key for key in _LANGUAGE_PARTS if isinstance(config.get(key), Mapping)), "")


def changed(config: Mapping[str, Any], family: Family | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """The config with other values, in the language model's part too if it has a key there; None removes a key."""
    key = nested_key(config, family)
    inner = config.get(key)
    below = {name: value for name, value in changes.items() if _has(inner, name)}
    own = {name: value for name, value in changes.items() if name in config or name not in below}
    whole = {name: value for name, value in {**config, **own}.items() if name not in own or value is not None}
    return {**whole, key: changed(inner, None, below)} if below and isinstance(inner, Mapping) else whole


def _has(config: Any, name: str) -> bool:
    """Return whether a config has a key, or the language model's part of it does."""
    return isinstance(config, Mapping) and (name in config or _has(config.get(nested_key(config, None)), name))


def portable_config(config: Mapping[str, Any], *, family: Family | None, dtype: str) -> dict[str, Any]:
    """config.json that transformers 4.5x and 5.x both read right, for tensors of element type `dtype`."""
    written = {key: value for key, value in config.items() if key not in ("auto_map", "_name_or_path")}
    family = None if family is not None and family.source else family  # transformers reads what it has written
    known, nested = normalized_config(config, family), written.get(nested_key(config, family))
    if family is None and isinstance(nested, Mapping):  # which of its parts reads what is not known
        return {**written, "torch_dtype": dtype, "dtype": dtype}
    language = dict(nested) if isinstance(nested, Mapping) else written
    write_rope(language, known, family.rope_scaling_keys if family else {})
    for name, key in family.keys.items() if family else ():
        if known.get(key) is not None:
            language.setdefault(name, known[key])
    if "n_positions" in language:  # GPT-2: llama.cpp's converter reads the old name, which transformers 5 dropped
        language.setdefault("n_ctx", language["n_positions"])
    if family is not None and language is not written:
        written[family.nested] = {**language, "torch_dtype": dtype, "dtype": dtype}
    return {**written, "torch_dtype": dtype, "dtype": dtype}


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Keys on which normalized configs disagree, those that do not matter left out: {key: {model: value}}."""
    configs = {name: _spread({**config, "rope_scaling": comparable_scaling(config)}) for name, config in configs.items()}
    keys = sorted({key for config in configs.values() for key in config} - _HARMLESS)
    values = {key: {name: config.get(key) for name, config in configs.items()} for key in keys}
    return {key: by_model for key, by_model in values.items() if _differ([_telling(value) for value in by_model.values()])}


def _spread(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with what other models in it, such as a vision tower, have as keys of its own: `vision_config.depth`."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        inside = isinstance(value, Mapping) and key.endswith("_config")
        found |= {f"{key}.{inner}": own for inner, own in value.items() if inner not in _HARMLESS} if inside else {key: value}
    return found


def _telling(value: Any) -> Any:
    """Reduce a value that may be another model's config to what matters of it."""
    if not isinstance(value, Mapping):
        return value
    return {key: _telling(inner) for key, inner in value.items() if key not in _HARMLESS}


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values[1:])
