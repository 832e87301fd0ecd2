"""PEFT adapters for tests, written without peft, and what they are worth by a slow and obvious formula.

write_adapter(tmp_path / "lora", low_rank("model.layers.0.mlp.up_proj", (24, 16), rank=4), r=4, lora_alpha=8)
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moerge.tensors.dtypes import F32, DType
from tests.helpers.tiny import write_json, write_safetensors

PREFIX = "base_model.model."


def write_adapter(folder: Path, tensors: Mapping[str, np.ndarray], *, dtype: str = "F32", **config: Any) -> Path:
    """An adapter's folder; keys of `config` are those of adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors if ".lora_" in name})
    whole = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 8, "lora_alpha": 8, "target_modules": targets, **config}
    write_json(folder / "adapter_config.json", whole)
    write_safetensors(
        folder / "adapter_model.safetensors", {PREFIX + name: value for name, value in tensors.items()}, dtype=dtype
    )
    return folder


def low_rank(module: str, shape: tuple[int, int], *, rank: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Factors of a change of a linear layer's weight [out, in]."""
    rng = np.random.default_rng([seed, zlib.crc32(module.encode())])
    return {
        f"{module}.lora_A.weight": 0.1 * rng.standard_normal((rank, shape[1]), np.float32),
        f"{module}.lora_B.weight": 0.1 * rng.standard_normal((shape[0], rank), np.float32),
    }


def merged(base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, *, transposed: bool = False) -> np.ndarray:
    """base + scale * B @ A in float64, its transpose for layers that store [in, out]."""
    change = scale * (b.astype(np.float64) @ a.astype(np.float64))
    return base + (change.T if transposed else change)


def with_magnitude(weight: np.ndarray, magnitude: np.ndarray, *, transposed: bool = False) -> np.ndarray:
    """DoRA: every output's row (or column) gets its norm."""
    norm = np.linalg.norm(weight, axis=0 if transposed else 1)
    return weight * (magnitude / norm) if transposed else weight * (magnitude / norm)[:, None]


@dataclass(frozen=True)
class InMemory:
    """A Tensor of float32 values."""

    name: str
    values: np.ndarray

    @property
    def dtype(self) -> DType:
        return F32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def open(self) -> InMemory:
        return self

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        out_N[:] = self.values.reshape(-1)[start : start + out_N.size]
        return out_N
