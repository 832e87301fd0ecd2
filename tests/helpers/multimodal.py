"""Tiny configs of models of several modalities, also of families that moerge does not know, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.hf_models import FAMILIES, GROUPED, transformers

_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
_IMAGES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}


def _mistral3() -> Any:
    vision = {**_VISION, "image_size": 8, "head_dim": 8, "model_type": "pixtral"}
    text = {**GROUPED, "head_dim": 8, "model_type": "mistral"}
    return transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=60, spatial_merge_size=1)


def _qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 2e4, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 4}
    vision["fullatt_block_indexes"] = [0]
    return transformers.Qwen2_5_VLConfig(text_config={**GROUPED, "rope_parameters": rope}, vision_config=vision, **_IMAGES)


def _qwen3_5() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    linear = {"key_heads": 2, "value_heads": 4, "key_head_dim": 8, "value_head_dim": 8}
    text = {
        **GROUPED,
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_conv_kernel_dim": 4,
        **{f"linear_{name}" if "dim" in name else f"linear_num_{name}": value for name, value in linear.items()},
        "rope_parameters": {**rope, "partial_rotary_factor": 0.5},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16}
    return transformers.Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True, **_IMAGES)


MULTIMODAL: dict[str, Callable[[], Any]] = {
    "gemma3": FAMILIES["gemma3"],
    "qwen2_vl": FAMILIES["qwen2_vl"],
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_5": _qwen3_5,
}
