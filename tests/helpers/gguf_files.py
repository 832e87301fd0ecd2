"""Tiny GGUF files, written by the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="needs moerge[gguf]")
pytest.importorskip("transformers", reason="needs moerge[gguf]")
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig  # noqa: E402

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def write_gguf(path: Path, model: Path, kind: str = "F32", *, architecture: str | None = None, **values: Any) -> Path:
    """A checkpoint folder as a GGUF file whose matrices are of this `kind`. `values` replace numbers in its header."""
    config = AutoConfig.from_pretrained(model)
    name = architecture or ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, name)
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        **({"attention.key_length": config.head_dim} if getattr(config, "head_dim", None) else {}),
        **values,
    }
    for key, value in numbers.items():
        writer.add_uint32(key if key.startswith("split") else f"{name}.{key}", value)
    if config.model_type == "qwen3_moe":
        writer.add_uint32(f"{name}.expert_count", config.num_experts)
        writer.add_uint32(f"{name}.expert_used_count", config.num_experts_per_tok)
        writer.add_uint32(f"{name}.expert_feed_forward_length", config.moe_intermediate_size)
    writer.add_float32(f"{name}.rope.freq_base", 10000.0)
    writer.add_float32(f"{name}.attention.layer_norm_rms_epsilon", 1e-6)
    _add_tokenizer(writer, config.vocab_size)
    stored = load_file(model / "model.safetensors")
    for key, value in _tensors(stored, config, ARCHITECTURES[config.model_type]).items():
        quantised = kind if value.ndim > 1 else "F32"
        data = gguf.quants.quantize(value, gguf.GGMLQuantizationType[quantised])
        writer.add_tensor(key, data, raw_dtype=gguf.GGMLQuantizationType[quantised])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, size: int) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(chr(ord("a") + i) for i in range(26)), "Ġ", "ab", "abc", "Ġa"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*tokens, *(f"w{i}" for i in range(size - len(tokens)))])
    writer.add_token_types([3, 3, 3, *([1] * (size - 3))])
    writer.add_token_merges(["a b", "ab c", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _tensors(model: Mapping[str, Any], config: Any, architecture: str) -> dict[str, np.ndarray]:
    """The tensors under llama.cpp's names: rows of Llama's queries and keys interleaved, experts stacked."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    experts: dict[str, list[np.ndarray]] = {}
    found: dict[str, np.ndarray] = {}
    for name, tensor in model.items():
        value, stored = tensor.float().numpy(), names.get_name(_EXPERT.sub(".experts.", name), (".weight", ".bias"))
        if _EXPERT.search(name):
            experts.setdefault(stored, []).append(value)
            continue
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
        part = ".".join(name.split(".")[-2:])
        if architecture == "llama" and part in heads:
            halves = value.reshape(heads[part], 2, len(value) // heads[part] // 2, -1)
            value = halves.swapaxes(1, 2).reshape(value.shape)
        found[stored] = value
    return found | {name: np.stack(values) for name, values in experts.items()}
