"""Mixtral: the token-routed format that Llama- and Mistral-shaped experts map to exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture.family import Family, MoEFormat, TensorRule
from moerge.architecture.llama import BACKBONE

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    tensors=(
        *BACKBONE,
        TensorRule("layers.{layer}.router", "model.layers.{layer}.block_sparse_moe.gate.weight", ("experts", "hidden")),
        TensorRule("layers.{layer}.ffn.{expert}.gate", f"{_EXPERT}.w1.weight", ("intermediate", "hidden")),
        TensorRule("layers.{layer}.ffn.{expert}.down", f"{_EXPERT}.w2.weight", ("hidden", "intermediate")),
        TensorRule("layers.{layer}.ffn.{expert}.up", f"{_EXPERT}.w3.weight", ("intermediate", "hidden")),
    ),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
)

_CARRIED_OVER = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings"),
    *("tie_word_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout"),
)


def _convert(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    carried = {key: config[key] for key in _CARRIED_OVER if key in config}
    return {
        "architectures": [MIXTRAL.architecture],
        "model_type": MIXTRAL.model_type,
        **carried,
        "sliding_window": config.get("sliding_window"),
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "output_router_logits": False,
        "use_cache": True,
    }


def _obstacle(config: Mapping[str, Any]) -> str | None:
    biased = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if biased:
        return f"{biased[0]} is true and Mixtral has no biases, so they would be lost"
    return None


MIXTRAL_FORMAT = MoEFormat("mixtral", MIXTRAL, frozenset({"llama", "mistral"}), _convert, _obstacle)
