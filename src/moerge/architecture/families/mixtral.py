"""Mixtral: the token-routed format that Llama- and Mistral-shaped experts map to exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture.families.llama import BACKBONE
from moerge.architecture.family import Family, TensorRule
from moerge.architecture.moe_format import MoEFormat, native_config

_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"

FUSED = (r".*\.experts\.(gate_up_proj|down_proj)",)
"""All experts of a layer in one tensor, as transformers 5 holds them in memory; on disk every expert has its own."""

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
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    fused=FUSED,
)


def _convert(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    window = config.get("sliding_window")
    return native_config(MIXTRAL, config, sliding_window=window, num_local_experts=experts, num_experts_per_tok=top_k)


def _obstacle(config: Mapping[str, Any]) -> str | None:
    if config.get("mlp_bias"):
        return "mlp_bias is true and Mixtral has no biases, so they would be lost"
    if config.get("attention_bias"):
        return "attention_bias is true and Mixtral has no biases, so they would be lost: choose 'format: granitemoe', which has"
    return None


MIXTRAL_FORMAT = MoEFormat("mixtral", MIXTRAL, frozenset({"llama", "mistral"}), _convert, _obstacle)
