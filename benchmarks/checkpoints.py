"""Random checkpoints in the shape of a real model, written once and kept: for speed, not for quality."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moerge.architecture.config import canonical
from moerge.architecture.family import expected_tensors
from moerge.architecture.llama import LLAMA
from moerge.checkpoint.dtypes import BF16
from moerge.checkpoint.header import build_header
from moerge.methods.codec import encode

SHAPES = {
    "0.1B": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "heads": (12, 4)},
    "0.5B": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "heads": (16, 4)},
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": (32, 4)},
    "2.2B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 46, "heads": (32, 4)},
}
"""1.1B is TinyLlama's shape; 2.2B is that with twice the layers."""


def config_of(size: str) -> dict[str, object]:
    shape = dict(SHAPES[size])
    heads, kv_heads = shape.pop("heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
        **shape,
    }


def make(folder: Path, size: str, names: tuple[str, ...] = ("base", "math", "code", "knowledge")) -> dict[str, Path]:
    """Checkpoints of `size` under `folder`: the first at random, the others a small random step away from it."""
    config = config_of(size)
    tensors = expected_tensors(LLAMA, canonical(config, LLAMA))
    header, offsets = build_header([(t.name, BF16, t.shape) for t in tensors], {"format": "pt"})
    paths = {name: folder / size / name for name in names}
    for index, (name, path) in enumerate(paths.items()):
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        with (path / "model.safetensors").open("wb") as file:
            file.write(header)
            for number, tensor in enumerate(tensors):
                file.seek(offsets[tensor.name])
                for block in _values(number, int(np.prod(tensor.shape)), index):
                    file.write(block.tobytes())
        (path / "config.json").write_text(json.dumps(config, indent=2))
    return paths


def _values(tensor: int, size: int, expert: int) -> list[np.ndarray]:
    blocks = []
    for start in range(0, size, 1 << 22):
        count = min(1 << 22, size - start)
        values = np.random.default_rng([tensor, start, 0]).standard_normal(count, np.float32) * np.float32(0.02)
        if expert:
            step = np.random.default_rng([tensor, start, expert]).standard_normal(count, np.float32)
            values += step * np.float32(0.002)
        encoded = np.empty(count, BF16.storage)
        encode(values, BF16, encoded)
        blocks.append(encoded)
    return blocks
