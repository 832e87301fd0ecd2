"""Phi-3: Llama with queries, keys and values in one matrix, and gate and up in another."""

from __future__ import annotations

from typing import Any

from moerge.architecture.families.llama import BEFORE_ATTENTION, BEFORE_FFN, BLOCK, EMBEDDING, FINAL, LAYER
from moerge.architecture.family import Family, TensorRule


def _derive(config: dict[str, Any]) -> None:
    """su and yarn are old names of longrope."""
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type") in ("su", "yarn"):
        config["rope_scaling"] = {**scaling, "rope_type": "longrope"}


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    tensors=(
        EMBEDDING,
        BEFORE_ATTENTION,
        TensorRule(f"{BLOCK}.attention.qkv", f"{LAYER}.self_attn.qkv_proj.weight", ("q+2*kv", "hidden")),
        TensorRule(f"{BLOCK}.attention.o", f"{LAYER}.self_attn.o_proj.weight", ("hidden", "q")),
        BEFORE_FFN,
        TensorRule(f"{BLOCK}.ffn.gate_up", f"{LAYER}.mlp.gate_up_proj.weight", ("2*intermediate", "hidden")),
        TensorRule(f"{BLOCK}.ffn.down", f"{LAYER}.mlp.down_proj.weight", ("hidden", "intermediate")),
        *FINAL,
    ),
    defaults={
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
    },
    derive=_derive,
    rope_scaling_keys={"rope_type": "type", "short_factor": "short_factor", "long_factor": "long_factor"},
)
