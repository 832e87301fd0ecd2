"""Quantised checkpoints that are not read are refused whichever way they say so; other integers and scales are no codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.header import build_header
from moerge.tensors.dtypes import DTYPES
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import edit_config, llama_config, llama_tensors, make_models, write_checkpoint, write_recipe

UP = "model.layers.0.mlp.up_proj"
CODES, SCALE = np.zeros((24, 16), np.int8), np.ones((24, 1), np.float32)


def with_tensors(folder: Path, drop: str = "", **changes: np.ndarray) -> None:
    tensors: dict[str, np.ndarray] = {**llama_tensors(llama_config(), seed=1), **changes}
    tensors.pop(drop, None)
    write_checkpoint(folder, tensors)


CONFIGS: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"compression_config": {"format": "int-quantized"}},
    {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
    {"quantization": {"group_size": 64, "bits": 4}},
]


@pytest.mark.parametrize("changes", CONFIGS)
@pytest.mark.parametrize("model", ["base", "code"])
def test_configs_that_say_so(tmp_path: Path, changes: dict[str, Any], model: str) -> None:
    edit_config(make_models(tmp_path)[model], **changes)
    key = next(iter(changes))
    refuses(
        write_recipe(tmp_path), tmp_path / "out", f"{model}: ", "is quantised", key, "unquantised checkpoint it was made from"
    )


TENSORS: dict[str, dict[str, np.ndarray]] = {
    "int8 weights and their scales": {f"{UP}.weight": CODES, f"{UP}.weight_scale": SCALE},
    "int8 weights alone": {f"{UP}.weight": CODES},
    "bitsandbytes": {f"{UP}.weight": CODES.astype(np.uint8), f"{UP}.weight.absmax": SCALE},
    "LLM.int8": {f"{UP}.weight": CODES, f"{UP}.SCB": SCALE},
    "GPTQ": {f"{UP}.qweight": CODES.astype(np.int32), f"{UP}.scales": SCALE},
    "compressed tensors": {f"{UP}.weight_packed": CODES.astype(np.int32), f"{UP}.weight_scale": SCALE},
    "MLX": {f"{UP}.weight": CODES.astype(np.uint32), f"{UP}.scales": SCALE, f"{UP}.biases": SCALE},
    "a zero point": {f"{UP}.weight": CODES.astype(np.uint8), f"{UP}.weight_zero_point": CODES},
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_say_so(tmp_path: Path, kind: str) -> None:
    with_tensors(make_models(tmp_path)["code"], **TENSORS[kind])
    refuses(write_recipe(tmp_path), tmp_path / "out", "code: ", "is quantised", UP)


def test_float8_without_scales(tmp_path: Path) -> None:
    """These are numbers, which another type can hold."""
    folder = make_models(tmp_path)["code"]
    tensors = llama_tensors(llama_config(), seed=1)
    stored = {name: ("F8_E4M3" if UP in name else "F32", value.shape, value) for name, value in tensors.items()}
    ordered = sorted(stored.items(), key=lambda item: item[1][0])
    header, _ = build_header([(name, DTYPES[kind], shape) for name, (kind, shape, _) in ordered], {"format": "pt"})
    content = b"".join(
        np.zeros(value.shape, np.uint8).tobytes() if kind == "F8_E4M3" else value.astype("<f4").tobytes()
        for _, (kind, _, value) in ordered
    )
    (folder / "model.safetensors").write_bytes(header + content)
    refuses(write_recipe(tmp_path), tmp_path / "out", "code: ", "is stored as F8_E4M3", "convert the checkpoint")


def test_an_adapter_on_a_quantised_base(tmp_path: Path) -> None:
    edit_config(make_models(tmp_path)["base"], compression_config={"format": "pack-quantized"})
    write_adapter(tmp_path / "lora", low_rank(f"{UP}", (24, 16), rank=2), r=2)
    refuses(write_recipe(tmp_path, experts={"lora": "lora"}), tmp_path / "out", "base: ", "is quantised")


def test_other_integers_and_scales_are_merged(tmp_path: Path) -> None:
    others = {
        "embeddings.position_ids": np.arange(8, dtype=np.int64)[None],
        "encoder.relative_position_index": np.zeros((4, 4), np.int64),
        "attn.bias": np.ones((1, 1, 4, 4), bool),
        "blocks.0.layer_scale": np.ones(4, np.float32),
        "logit_scale": np.ones((), np.float32),
        "norm.weight": np.ones(4, np.float32),
        "norm.scale": np.ones(4, np.float32),
    }
    for name in ("base", "code"):
        write_checkpoint(tmp_path / name, others, {"model_type": "novel"})
    result = moerge("plan", write_recipe(tmp_path, experts=["code"], merge={"method": "average"}))
    assert result.code == 0, result.err
