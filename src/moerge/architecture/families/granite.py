"""Granite and GraniteMoe, to which Granite experts map exactly, and Llama experts with biases in their attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture.families.llama import BEFORE_ATTENTION, BEFORE_FFN, BLOCK, EMBEDDING, FINAL, LAYER, attention, ffn
from moerge.architecture.families.mixtral import FUSED
from moerge.architecture.family import Family, TensorRule
from moerge.architecture.moe_format import MoEFormat, native_config

_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BACKBONE = (EMBEDDING, BEFORE_ATTENTION, *attention("qkvo", "attention_bias"), BEFORE_FFN)


def _logit_scale(config: Mapping[str, Any]) -> float:
    return 1 / float(config["logits_scaling"])


GRANITE = Family(
    model_type="granite",
    architecture="GraniteForCausalLM",
    tensors=(*_BACKBONE, *ffn(bias="mlp_bias"), *FINAL),
    defaults={**_DEFAULTS, "mlp_bias": False},
    logit_scale=_logit_scale,
)

_FFN, _MODULE = f"{BLOCK}.ffn", f"{LAYER}.block_sparse_moe"

GRANITEMOE = Family(
    model_type="granitemoe",
    architecture="GraniteMoeForCausalLM",
    tensors=(
        *_BACKBONE,
        TensorRule(f"{BLOCK}.router", f"{_MODULE}.router.layer.weight", ("experts", "hidden")),
        TensorRule(
            f"{_FFN}.gate_up",
            f"{_MODULE}.input_linear.weight",
            ("experts", "2*intermediate", "hidden"),
            parts=(f"{_FFN}.gate", f"{_FFN}.up"),
        ),
        TensorRule(
            f"{_FFN}.down", f"{_MODULE}.output_linear.weight", ("experts", "hidden", "intermediate"), parts=(f"{_FFN}.down",)
        ),
        *FINAL,
    ),
    defaults={**_DEFAULTS, "num_experts_per_tok": 2, "num_local_experts": 8},
    fused=FUSED,
    logit_scale=_logit_scale,
)


def _convert(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    own = {"num_local_experts": experts, "num_experts_per_tok": top_k, "attention_bias": config.get("attention_bias", False)}
    own |= {key: config.get(key, 1.0) for key in ("embedding_multiplier", "logits_scaling", "residual_multiplier")}
    own["attention_multiplier"] = config.get("attention_multiplier", config["head_dim"] ** -0.5)  # Llama's is this
    return native_config(GRANITEMOE, config, **own)


def _obstacle(config: Mapping[str, Any]) -> str | None:
    if config.get("mlp_bias"):
        return "mlp_bias is true and GraniteMoe has no biases in its experts, so they would be lost"
    return None


def _caution(config: Mapping[str, Any]) -> str | None:
    width, heads, head = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if isinstance(width, int) and isinstance(heads, int) and head != width // heads:
        return f"transformers 4 cannot load a GraniteMoe with a head_dim of its own ({head}): use transformers 5"
    return None


GRANITEMOE_FORMAT = MoEFormat(
    "granitemoe",
    GRANITEMOE,
    frozenset({"granite", "llama"}),
    _convert,
    _obstacle,
    fallback_for=frozenset({"llama"}),
    warning=_caution,
)
