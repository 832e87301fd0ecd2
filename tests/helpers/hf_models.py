"""Tiny random models of every family that moerge knows, as transformers makes and writes them.

    CASES["qwen3-bias"]()                       # a config
    model = random_model(config, seed=1)        # every weight random, norms near 1
    save(model, folder)                         # a checkpoint with the tokenizer of tiny.py

A case's name is its model type, and after a dash what is special about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny import VOCABULARY, write_tokenizer

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 7000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 3000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 32,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def _case(name: str, sizes: Mapping[str, Any] = GROUPED, **keys: Any) -> Callable[..., Any]:
    return lambda **more: getattr(transformers, f"{name}Config")(**{**sizes, **keys, **more})


def _gpt2(**more: Any) -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **more}
    return transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, bos_token_id=1, eos_token_id=2)


def _gemma3(*, tie_word_embeddings: bool = True, **more: Any) -> Any:
    text = {**GROUPED, "head_dim": 8, "tie_word_embeddings": tie_word_embeddings, **more}
    return transformers.Gemma3Config(
        text_config=text, vision_config=_VISION, mm_tokens_per_image=4, tie_word_embeddings=tie_word_embeddings
    )


def _qwen2_vl(*, tie_word_embeddings: bool = False, **more: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 2e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2}
    text = {**GROUPED, "rope_parameters": rope, **more}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tie_word_embeddings, **tokens)


FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _case("Llama"),
    "mistral": _case("Mistral"),
    "qwen2": _case("Qwen2"),
    "qwen2_vl": _qwen2_vl,
    "qwen3": _case("Qwen3", head_dim=8),
    "olmo2": _case("Olmo2"),
    "granite": _case("Granite", embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.2),
    "gemma": _case("Gemma", head_dim=8),
    "gemma2": _case("Gemma2", head_dim=8, sliding_window=5),
    "gemma3_text": _case("Gemma3Text", head_dim=8, sliding_window=5),
    "gemma3": _gemma3,
    "phi3": _case("Phi3"),
    "gpt_neox": _case("GPTNeoX", SIZES),
    "gpt2": _gpt2,
    "mixtral": _case("Mixtral", num_local_experts=3),
    "qwen2_moe": _case(
        "Qwen2Moe", num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, shared_expert_intermediate_size=12
    ),
    "qwen3_moe": _case("Qwen3Moe", head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20),
    "olmoe": _case("Olmoe", num_experts=3, num_experts_per_tok=2),
    "flex_olmo": _case("FlexOlmo", num_experts=3, num_experts_per_tok=2),
    "granitemoe": _case("GraniteMoe", num_local_experts=3),
}
"""A config of every family, by model type; keys of the config can be given."""

FLAGS: dict[str, dict[str, Any]] = {
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-head": {"head_dim": 12},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "mistral-full": {"sliding_window": None},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3-bias": {"attention_bias": True},
    "qwen3-yarn": {"rope_parameters": YARN},
    "olmo2-bias": {"attention_bias": True},
    "olmo2-linear": {"rope_parameters": LINEAR},
    "olmo2-yarn": {"rope_parameters": YARN},
    "granite-biases": {"attention_bias": True, "mlp_bias": True},
    "gemma-bias": {"attention_bias": True},
    "gemma2-bias": {"attention_bias": True},
    "gemma3_text-bias": {"attention_bias": True, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3-longrope": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "phi3-partial": {"rope_parameters": {"rope_theta": 2e4, "partial_rotary_factor": 0.5}},
    "gpt_neox-no-bias": {"attention_bias": False},
    "gpt_neox-rotary": {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 1.0}},
    "gpt2-inner": {"n_inner": 40},
    "gpt2-cross": {"add_cross_attention": True},
    "qwen2_moe-dense-layers": {"mlp_only_layers": [1], "num_hidden_layers": 4, "decoder_sparse_step": 2},
    "qwen2_moe-no-bias": {"qkv_bias": False},
    "qwen2_moe-no-shared": {"shared_expert_intermediate_size": 0},
    "qwen3_moe-dense-layers": {"mlp_only_layers": [0], "attention_bias": True},
    "olmoe-bias": {"attention_bias": True},
    "flex_olmo-bias": {"attention_bias": True},
    "granitemoe-bias": {"attention_bias": True},
}

CASES: dict[str, Callable[..., Any]] = {
    **FAMILIES,
    **{f"{name}-tied": (lambda make=make: make(tie_word_embeddings=True)) for name, make in FAMILIES.items()},
    **{f"{name}-untied": (lambda make=make: make(tie_word_embeddings=False)) for name, make in FAMILIES.items()},
    **{name: (lambda name=name: FAMILIES[name.partition("-")[0]](**FLAGS[name])) for name in FLAGS},
}
"""Configs with everything that adds or removes tensors, and with rope in all forms."""

TOKENS = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(3))


def auto_class(config: Any) -> Any:
    """What loads a model with this config, whole."""
    whole = transformers.AutoModelForImageTextToText
    if hasattr(config, "vision_config") and type(config) in whole._model_mapping:
        return whole
    known = type(config) in transformers.AutoModelForCausalLM._model_mapping or config.model_type == "moerge"
    return transformers.AutoModelForCausalLM if known else whole


def random_model(config: Any, seed: int, *, near: Any = None, dtype: Any = None) -> Any:
    """A model whose every weight, norms too, is random; `near` another one if that is given."""
    torch.manual_seed(seed)
    model = auto_class(config).from_config(config)
    state = model.state_dict()
    for name, tensor in state.items():
        start = (
            near.state_dict()[name] if near is not None else torch.zeros_like(tensor) + ("norm" in name and "bias" not in name)
        )
        tensor.copy_(start + torch.randn_like(tensor) * (0.03 if near is not None else 0.15))
    model.tie_weights()
    return model.to(dtype or torch.float32).eval()


def save(model: Any, folder: Path) -> Path:
    """A checkpoint with a tokenizer."""
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def load(folder: Path, **options: Any) -> Any:
    """A model that loads without a word about its tensors."""
    transformers.utils.logging.disable_progress_bar()
    auto = auto_class(transformers.AutoConfig.from_pretrained(folder))
    model, report = auto.from_pretrained(folder, output_loading_info=True, dtype=options.pop("dtype", torch.float32), **options)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def logits(model: Any, tokens: Any = TOKENS) -> Any:
    """Logits in float32."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


def read_config(folder: Path) -> dict[str, Any]:
    """config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config
