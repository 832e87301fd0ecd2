"""Gemma 1, 2 and 3; of the multimodal Gemma 3 the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moerge.architecture.families.llama import BEFORE_ATTENTION, BEFORE_FFN, EMBEDDING, FINAL, attention, ffn, head_norms, norm
from moerge.architecture.families.qwen import FULL, SLIDING
from moerge.architecture.family import Family
from moerge.architecture.sizes import layer_count

_ATTENTION = attention("qkvo", "attention_bias")
_SANDWICHED = (
    norm("post_attention", "post_attention_layernorm"),
    norm("ffn", "pre_feedforward_layernorm"),
    *ffn(),
    norm("post_ffn", "post_feedforward_layernorm"),
    *FINAL,
)
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "head_dim": 256,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "use_bidirectional_attention": None,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GELU = "gelu_pytorch_tanh"


def _derive_gemma(config: dict[str, Any]) -> None:
    """The activation is the approximate gelu even where old configs say gelu."""
    chosen = config.pop("hidden_activation", None) or config.get("hidden_act")
    config["hidden_act"] = _GELU if chosen == "gelu" else chosen


def _derive_sliding(config: dict[str, Any], every: int) -> None:
    """All layers but each `every`th have a sliding window; `hidden_act` means nothing here."""
    config.pop("hidden_act", None)
    if config.get("layer_types") is None:
        config["layer_types"] = [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(layer_count(config))]


def _derive_gemma2(config: dict[str, Any]) -> None:
    _derive_sliding(config, 2)


def _derive_gemma3(config: dict[str, Any]) -> None:
    every = [config.pop(key, None) for key in ("sliding_window_pattern", "_sliding_window_pattern")]
    _derive_sliding(config, next((number for number in every if isinstance(number, int) and number > 0), 6))
    config["use_bidirectional_attention"] = config.get("use_bidirectional_attention") or None


def _embedding_scale(config: Mapping[str, Any]) -> float:
    return float(config["hidden_size"] ** 0.5)


GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    tensors=(EMBEDDING, BEFORE_ATTENTION, *_ATTENTION, BEFORE_FFN, *ffn(), *FINAL),
    defaults={**_DEFAULTS, "num_key_value_heads": 16, "hidden_act": _GELU},
    derive=_derive_gemma,
    embedding_scale=_embedding_scale,
)

GEMMA2 = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    tensors=(EMBEDDING, BEFORE_ATTENTION, *_ATTENTION, *_SANDWICHED),
    defaults={
        **_DEFAULTS,
        "num_key_value_heads": 4,
        "hidden_activation": _GELU,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    derive=_derive_gemma2,
    embedding_scale=_embedding_scale,
)

GEMMA3_TEXT = Family(
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    tensors=(EMBEDDING, BEFORE_ATTENTION, *_ATTENTION, *head_norms(), *_SANDWICHED),
    defaults={
        **GEMMA2.defaults,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    derive=_derive_gemma3,
    embedding_scale=_embedding_scale,
)

_LANGUAGE = "language_model."

GEMMA3 = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    tensors=tuple(replace(rule, name=_LANGUAGE + rule.name) for rule in GEMMA3_TEXT.tensors),
    defaults=GEMMA3_TEXT.defaults,
    nested="text_config",
    derive=_derive_gemma3,
    aliases=(
        (r"model\.language_model\.", f"{_LANGUAGE}model."),
        (r"lm_head\.", f"{_LANGUAGE}lm_head."),
        (r"model\.(?=vision_tower\.|multi_modal_projector\.)", ""),
    ),
    unmodeled=(r"(vision_tower|multi_modal_projector)\..*",),
)
