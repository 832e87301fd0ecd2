"""Tiny configs of models of several modalities, also of families that moerge does not know, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.helpers.hf_models import FAMILIES, GROUPED, torch, transformers

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


def _qwen3_vl(**more: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 2e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**GROUPED, "head_dim": 8, "rope_parameters": rope, **more}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_IMAGES)


def _whole(name: str, text: str, vision: dict[str, Any], **keys: Any) -> Callable[[], Any]:
    """A config of a vision tower, a projector and a language model of this type."""
    sizes = {**GROUPED, "model_type": text, **({"head_dim": 8} if text == "gemma" else {})}
    tower = {**_VISION, "image_size": 8, **vision}
    return lambda: getattr(transformers, f"{name}Config")(text_config=sizes, vision_config=tower, **keys)


_SQUARES = {"image_size": [8, 8], "patch_size": [4, 4]}
_SIGLIP = {"model_type": "siglip_vision_model", "projection_dim": 32}

MULTIMODAL: dict[str, Callable[[], Any]] = {
    "gemma3": FAMILIES["gemma3"],
    "qwen2_vl": FAMILIES["qwen2_vl"],
    "mistral3": _mistral3,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_5": _qwen3_5,
}
VISION_LANGUAGE: dict[str, Callable[[], Any]] = {
    **MULTIMODAL,
    "qwen3_vl": _qwen3_vl,
    "llava": _whole("Llava", "llama", {"model_type": "clip_vision_model"}, image_token_index=60),
    "idefics3": _whole("Idefics3", "llama", {}, image_token_id=60, scale_factor=1),
    "internvl": _whole("InternVL", "qwen2", _SQUARES, image_token_id=60),
    "paligemma": _whole("PaliGemma", "gemma", _SIGLIP, projection_dim=32, image_token_index=60, vocab_size=64),
}
"""The same, and some of other shapes: names with and without prefixes, tied and not."""
_TEXT_TWINS = {"qwen2_vl_text": "Qwen2", "qwen2_5_vl_text": "Qwen2", "qwen3_vl_text": "Qwen3"}


def text_config(config: Any) -> Any:
    """The config of a text model like the language model of this one."""
    inner = config.get_text_config()
    kind = getattr(transformers, f"{_TEXT_TWINS[inner.model_type]}Config") if inner.model_type in _TEXT_TWINS else type(inner)
    values = {key: value for key, value in inner.to_dict().items() if key in {*kind().to_dict(), "head_dim"}}
    if kind is not type(inner):
        values["rope_parameters"] = {"rope_type": "default", "rope_theta": inner.rope_parameters["rope_theta"]}
    return kind(**{**values, "model_type": kind.model_type, "tie_word_embeddings": config.tie_word_embeddings})


def language_model(model: Any) -> Any:
    """The module inside a multimodal model that is a text model without its head."""
    inner = model.model
    return getattr(inner, "language_model", None) or inner.text_model


def picture(config: Any) -> dict[str, Any]:
    """A prompt with an image of 4 x 4 patches, as a model of Qwen's kind takes it."""
    numbers, vision = torch.Generator().manual_seed(5), config.vision_config
    width = 3 * vision.temporal_patch_size * vision.patch_size**2
    ids = torch.tensor([[5, config.vision_start_token_id, *4 * [config.image_token_id], config.vision_end_token_id, 7, 8, 9]])
    pixels = torch.randn(16, width, generator=numbers, dtype=torch.float64)
    grid = torch.tensor([[1, 4, 4]])
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": grid,
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }
