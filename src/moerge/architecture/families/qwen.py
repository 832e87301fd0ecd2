"""Qwen2 and Qwen3: Llama with biases on queries, keys and values, and with norms on queries and keys."""

from __future__ import annotations

from typing import Any

from moerge.architecture.families.llama import BEFORE_ATTENTION, BEFORE_FFN, EMBEDDING, FINAL, attention, ffn, head_norms
from moerge.architecture.family import Family
from moerge.architecture.sizes import layer_count

SLIDING, FULL = "sliding_attention", "full_attention"


def derive_windows(config: dict[str, Any]) -> None:
    """Return the layers with a sliding window, as transformers 5 writes them down; no window where no layer slides."""
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    first = config.get("max_window_layers", 0) if window else None
    if config.get("layer_types") is None:
        layers = range(layer_count(config))
        config["layer_types"] = [SLIDING if isinstance(first, int) and layer >= first else FULL for layer in layers]
    slides = bool(window) and SLIDING in config["layer_types"]
    config |= {"use_sliding_window": slides, "sliding_window": window if slides else None}
    config["max_window_layers"] = first if slides else None


_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
}

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    tensors=(EMBEDDING, BEFORE_ATTENTION, *attention("qkv"), BEFORE_FFN, *ffn(), *FINAL),
    defaults=_DEFAULTS,
    derive=derive_windows,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    tensors=(
        EMBEDDING,
        BEFORE_ATTENTION,
        *attention("qkvo", "attention_bias"),
        *head_norms(),
        BEFORE_FFN,
        *ffn(),
        *FINAL,
    ),
    defaults={**_DEFAULTS, "head_dim": 128, "attention_bias": False},
    derive=derive_windows,
)
