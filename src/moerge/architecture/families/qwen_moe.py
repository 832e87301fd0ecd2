"""Qwen2-MoE and Qwen3-MoE, and the formats that Qwen2 and Qwen3 experts map to exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.architecture.families.llama import (
    BEFORE_ATTENTION,
    BEFORE_FFN,
    BLOCK,
    EMBEDDING,
    FINAL,
    LAYER,
    attention,
    ffn,
    head_norms,
)
from moerge.architecture.families.mixtral import FUSED
from moerge.architecture.families.qwen import FULL, SLIDING
from moerge.architecture.family import Family, TensorRule
from moerge.architecture.moe_format import MoEFormat, SharedSlot, native_config
from moerge.architecture.sizes import layer_count

SHARED_SIZE = 64
"""Width of the shared expert that Qwen2-MoE needs and that computes nothing: llama.cpp takes 0 for the size of the others."""


def expert_modules(size: str, when: str = "") -> tuple[TensorRule, ...]:
    """The router and the experts' modules of a layer: `mlp.gate`, `mlp.experts.i.{gate,up,down}_proj`."""
    router = TensorRule(f"{BLOCK}.router", f"{LAYER}.mlp.gate.weight", ("experts", "hidden"), when)
    return (router, *ffn(size, role="ffn.{expert}", module="mlp.experts.{expert}", when=when))


def _derive_moe_layers(config: dict[str, Any]) -> None:
    """Return the layers with experts: all but `mlp_only_layers`, and of the rest each `decoder_sparse_step`th."""
    step, without = config.pop("decoder_sparse_step", 1), config.pop("mlp_only_layers", None) or []
    sparse = bool(config.get("num_local_experts")) and isinstance(step, int) and step > 0
    config["moe_layers"] = [sparse and layer not in without and (layer + 1) % step == 0 for layer in range(layer_count(config))]


def _derive_qwen2_moe(config: dict[str, Any]) -> None:
    _derive_moe_layers(config)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    if config.get("layer_types") is None:  # other layers than in Qwen2
        last, layers = config.get("max_window_layers"), range(layer_count(config))
        slides = [bool(window) and isinstance(last, int) and layer < last and layer % 2 == 0 for layer in layers]
        config["layer_types"] = [SLIDING if sliding else FULL for sliding in slides]
    config |= {"use_sliding_window": bool(window), "sliding_window": window or None, "max_window_layers": None}


def _derive_qwen3_moe(config: dict[str, Any]) -> None:
    _derive_moe_layers(config)
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    config |= {"use_sliding_window": bool(window), "sliding_window": window}


_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "norm_topk_prob": False,
}

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    tensors=(
        EMBEDDING,
        BEFORE_ATTENTION,
        *attention("qkv", "qkv_bias"),
        BEFORE_FFN,
        *ffn(when="!moe_layers"),
        *expert_modules("moe_intermediate", "moe_layers"),
        *ffn("shared", role="ffn.shared", module="mlp.shared_expert", when="moe_layers"),
        TensorRule(f"{BLOCK}.ffn.shared_gate", f"{LAYER}.mlp.shared_expert_gate.weight", ("1", "hidden"), "moe_layers"),
        *FINAL,
    ),
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_local_experts": 60,
        "qkv_bias": True,
    },
    keys={"num_experts": "num_local_experts"},
    sizes={"moe_intermediate": "moe_intermediate_size"},
    derive=_derive_qwen2_moe,
    fused=FUSED,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    tensors=(
        EMBEDDING,
        BEFORE_ATTENTION,
        *attention("qkvo", "attention_bias"),
        *head_norms(),
        BEFORE_FFN,
        *ffn(when="!moe_layers"),
        *expert_modules("moe_intermediate", "moe_layers"),
        *FINAL,
    ),
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_local_experts": 128,
    },
    keys={"num_experts": "num_local_experts"},
    sizes={"moe_intermediate": "moe_intermediate_size"},
    derive=_derive_qwen3_moe,
    fused=FUSED,
)


def _routed(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    """Return the settings of experts that both configs share: in every layer, of the dense size, with weights that add up to
    1.
    """
    return {
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": config.get("intermediate_size"),
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": config.get("use_sliding_window", False),
        "sliding_window": config.get("sliding_window"),
    }


def dense_layers(chosen: Sequence[bool]) -> dict[str, Any]:
    """Return the keys that list the layers without experts, whichever they are."""
    return {"mlp_only_layers": [layer for layer, has_experts in enumerate(chosen) if not has_experts]}


def shared_width(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that make the shared expert as wide as a dense module."""
    return {"shared_expert_intermediate_size": config.get("intermediate_size")}


def _convert_qwen2(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    windows = {"layer_types": config.get("layer_types"), "max_window_layers": config.get("max_window_layers") or 0}
    own = {**_routed(config, experts, top_k), **windows, "shared_expert_intermediate_size": SHARED_SIZE, "qkv_bias": True}
    return native_config(QWEN2_MOE, config, **own)


def _convert_qwen3(config: Mapping[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    own = {**_routed(config, experts, top_k), "attention_bias": config.get("attention_bias", False)}
    return native_config(QWEN3_MOE, config, **own)


def _qwen3_obstacle(config: Mapping[str, Any]) -> str | None:
    if config.get("use_sliding_window") and FULL in (config.get("layer_types") or ()):
        return "some layers have a sliding window and others have not, and Qwen3-MoE has one window for all layers"
    return None


def _qwen2_caution(config: Mapping[str, Any]) -> str | None:
    if config.get("use_sliding_window") and FULL in (config.get("layer_types") or ()):
        return "transformers 4 takes the sliding window of some layers for one of all layers in a Qwen2-MoE: use transformers 5"
    return None


QWEN2_MOE_FORMAT = MoEFormat(
    "qwen2_moe",
    QWEN2_MOE,
    frozenset({"qwen2"}),
    _convert_qwen2,
    lambda config: None,
    zero_roles=("ffn.shared",),
    random_roles=("ffn.shared_gate",),  # llama.cpp computes sigmoid(x) as silu(x) / x, which is NaN for 0
    warning=_qwen2_caution,
    shared=SharedSlot(shared_width, gated=True),
    layers=dense_layers,
)
QWEN3_MOE_FORMAT = MoEFormat("qwen3_moe", QWEN3_MOE, frozenset({"qwen3"}), _convert_qwen3, _qwen3_obstacle, layers=dense_layers)
