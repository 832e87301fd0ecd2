"""Tiny configs of models of several modalities, also of families that moerge does not know, by model type."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers import tiny
from tests.helpers.hf_models import FAMILIES, GROUPED, random_model, save, torch, transformers

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


def vision_mixture() -> Any:
    """The config of a mixture of experts that sees."""
    like, experts = _qwen3_vl(), {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = {key: value for key, value in like.text_config.to_dict().items() if key != "model_type"}
    vision = {key: value for key, value in like.vision_config.to_dict().items() if key != "model_type"}
    return transformers.Qwen3VLMoeConfig(text_config={**text, **experts}, vision_config=vision, **_IMAGES)


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


_TEMPLATE = """{% for message in messages %}{{ message.role }} {% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}\
{{ part.text }}{% endif %}{% endfor %}{% endif %} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"""
_MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")


def write_processor(folder: Path) -> None:
    """A tokenizer with a chat template and a processor of images, as Qwen's models have them."""
    words = ["user", "assistant", *(f"w{number}" for number in range(5, 60))]
    tiny.write_tokenizer(folder, ["<unk>", "<s>", "</s>", *words, *_MARKS])
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    first = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] += [{**first, "id": 60 + number, "content": mark} for number, mark in enumerate(_MARKS)]
    tiny.write_json(file, tokenizer)
    (folder / "chat_template.jinja").write_text(_TEMPLATE)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 64, "max_pixels": 512}
    tiny.write_json(folder / "preprocessor_config.json", {"image_processor_type": "Qwen2VLImageProcessor", **sizes})


def write_pictures(folder: Path, name: str, count: int, *, seed: int = 0) -> Path:
    """A jsonl file of questions about images and answers, in three usual spellings, and the images beside it."""
    from PIL import Image

    numbers, lines = np.random.default_rng(seed), []
    for index in range(count):
        picture = f"{name}{index}.png"
        Image.fromarray(numbers.integers(0, 255, (16, 8 * (1 + index % 3), 3), dtype=np.uint8)).save(folder / picture)
        question, answer = (" ".join(f"w{token}" for token in numbers.integers(5, 60, 4)) for _ in range(2))
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        messages: Sequence[Any] = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
        told = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        bare = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        spelled = ({"messages": messages}, {"conversations": told, "image": picture}, {"messages": bare, "images": [picture]})
        lines.append(json.dumps(spelled[index % 3]))
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(lines))
    return path


def save_with_processor(config: Any, folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Models of one config by name, the others near the first, with tokenizer and processor."""
    models: dict[str, Any] = {}
    for seed, name in enumerate(names, 1):
        models[name] = random_model(config, seed, near=next(iter(models.values()), None))
        save(models[name], folder / name)
        write_processor(folder / name)
    return models
