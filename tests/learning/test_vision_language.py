"""The language part of a vision-language model learns; what not all models share stays the base's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from moerge.recipe.coefficients import read_coefficients
from tests.helpers.command import moerge
from tests.helpers.tiny import write_tokenizer

pytestmark = pytest.mark.slow


def save_models(folder: Path) -> None:
    config: Any = Qwen2VLConfig(image_token_id=60, video_token_id=61, vision_start_token_id=58, vision_end_token_id=59)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config.text_config.update({**sizes, "num_key_value_heads": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2})
    config.text_config.layer_types = ["full_attention"] * 2
    config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config.vision_config.update({"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2})
    torch.manual_seed(0)
    model: Any = Qwen2VLForConditionalGeneration(config)
    for name in ("base", "math", "code"):
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name)
        (folder / f"{name}.txt").write_text("\n\n".join(" ".join(f"w{(i * j) % 50 + 3}" for j in range(9)) for i in range(1, 5)))
    weights = folder / "code" / "model.safetensors"
    tensors = load_file(weights)
    save_file({key: value for key, value in tensors.items() if not key.startswith("visual.")}, weights, {"format": "pt"})


def test_the_language_part_learns(tmp_path: Path) -> None:
    save_models(tmp_path)
    recipe = {
        "base": "base",
        "experts": {"math": "math", "code": "code"},
        "merge": {"method": "task_arithmetic", "scale": 0.3},
        "calibration": {"math": "math.txt", "code": "code.txt"},
        "learn": {"heldout": 0.0, "gamma": 0.0, "texts": 4},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = moerge("learn", tmp_path / "recipe.yaml", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    warnings = json.loads(done.out)["warnings"]
    assert any("tensors that not all models share are base's" in text and ": visual." in text for text in warnings)
    found = read_coefficients(tmp_path / "out" / "coefficients.json")
    assert len(found.by_tensor) == 14 and all(name.startswith("model.layers.") for name in found.by_tensor)
    assert len({row[0] for rows in found.by_tensor.values() for row in rows}) > 14
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "base" / "model.safetensors")
    assert all(torch.equal(merged[name], base[name]) for name in base if name.startswith("visual."))
    assert not torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "out")
