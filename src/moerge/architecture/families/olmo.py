"""OLMo 2, OLMoE and FlexOlmo, to which OLMo 2 experts map exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture.families.llama import BEFORE_ATTENTION, BEFORE_FFN, EMBEDDING, FINAL, attention, ffn, head_norms, norm
from moerge.architecture.families.mixtral import FUSED
from moerge.architecture.families.qwen_moe import expert_modules
from moerge.architecture.family import Family
from moerge.architecture.moe_format import MoEFormat, native_config

_ATTENTION = (*attention("qkvo", "attention_bias"), *head_norms("q", "kv"))
_POST_NORMS = (norm("post_attention", "post_attention_layernorm"), norm("post_ffn", "post_feedforward_layernorm"))
_SCALING = {"rope_type": "type", "factor": "factor"}
_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "eos_token_id": 50279,
}

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    tensors=(EMBEDDING, *_ATTENTION, *_POST_NORMS, *ffn(), *FINAL),
    defaults=_DEFAULTS,
    rope_scaling_keys=_SCALING,
)

OLMOE = Family(
    model_type="olmoe",
    architecture="OlmoeForCausalLM",
    tensors=(EMBEDDING, BEFORE_ATTENTION, *_ATTENTION, BEFORE_FFN, *expert_modules("intermediate"), *FINAL),
    defaults={
        **_DEFAULTS,
        "max_position_embeddings": 4096,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_local_experts": 64,
        "norm_topk_prob": False,
    },
    keys={"num_experts": "num_local_experts"},
    fused=FUSED,
)

FLEX_OLMO = Family(
    model_type="flex_olmo",
    architecture="FlexOlmoForCausalLM",
    tensors=(EMBEDDING, *_ATTENTION, *_POST_NORMS, *expert_modules("intermediate"), *FINAL),
    defaults={
        **_DEFAULTS,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "max_position_embeddings": 4096,
        "num_experts_per_tok": 5,
        "num_local_experts": 7,
        "norm_topk_prob": False,
        "pad_token_id": 100277,
        "eos_token_id": 100257,
    },
    keys={"num_experts": "num_local_experts"},
    fused=FUSED,
)


def _convert(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    own = {"num_experts": experts, "num_experts_per_tok": top_k, "norm_topk_prob": True}
    return native_config(FLEX_OLMO, config, **own, attention_bias=config.get("attention_bias", False))


FLEX_OLMO_FORMAT = MoEFormat("flex_olmo", FLEX_OLMO, frozenset({"olmo2"}), _convert, lambda config: None)
