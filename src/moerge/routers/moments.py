"""Sums over router inputs, of which gates are made without training.

Shapes: L layers, E experts, H hidden, T tokens. Sums add up: those of two texts together are the sums of each, added.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moerge.checkpoint.header import build_header, read_header
from moerge.checkpoint.workspace import machine_errors
from moerge.errors import InputError
from moerge.files import atomic_path
from moerge.tensors.dtypes import F32

_COUNT, _SUM, _MOMENT = "tokens", "sum", "moment"


@dataclass(frozen=True)
class GramStatistics:
    """sum of [x, 1]^T [x, 1] over router inputs x, by layer: the number of tokens, the sum of x, the sum of x^T x.

    `facts` says what they were computed from. Values are held as they are stored, in float32, so that statistics read back
    give the same gates as fresh ones.
    """

    tokens: int
    sum_LH: np.ndarray
    gram_LHH: np.ndarray
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: GramStatistics) -> GramStatistics:
        """The statistics of both texts together."""
        return GramStatistics(self.tokens + other.tokens, self.sum_LH + other.sum_LH, self.gram_LHH + other.gram_LHH)

    @property
    def mean_LH(self) -> np.ndarray:
        """The mean router input of each layer."""
        return self.sum_LH.astype(np.float64) / self.tokens


def save_moments(path: Path, moments: GramStatistics) -> None:
    """Write a safetensors file, complete or not at all. Of the symmetric moment only the upper triangle is stored."""
    rows, columns = np.triu_indices(moments.sum_LH.shape[1])
    arrays = {_SUM: moments.sum_LH} | {
        f"{_MOMENT}.{layer}": gram_HH[rows, columns] for layer, gram_HH in enumerate(moments.gram_LHH)
    }
    facts = {"moerge": json.dumps(moments.facts, sort_keys=True), _COUNT: str(moments.tokens)}
    header, _ = build_header([(name, F32, array.shape) for name, array in arrays.items()], facts)
    with machine_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside, open(beside, "wb") as file:
            file.write(header)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array, F32.storage).tobytes())


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of a statistics file; InputError if it is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            metadata = json.loads(file.read(min(length, 100_000_000)))["__metadata__"]
        return {_COUNT: int(metadata[_COUNT]), **json.loads(metadata["moerge"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no router statistics: remove it, so that they are computed again ({error})") from None


def load_moments(path: Path, layers: int, hidden: int) -> GramStatistics:
    """Statistics that `save_moments` wrote; InputError if they are damaged or belong to a model of another shape."""
    facts, stored = read_facts(path), read_header(path)
    wanted = {_SUM: (layers, hidden)} | {f"{_MOMENT}.{i}": (hidden * (hidden + 1) // 2,) for i in range(layers)}
    if {name: tensor.shape for name, tensor in stored.items()} != wanted:
        raise InputError(f"{path} holds router statistics of another model: this one has {layers} layers of width {hidden}")
    arrays = {name: tensor.open().read(0, np.empty(tensor.size, F32.storage)) for name, tensor in stored.items()}
    upper = np.triu_indices(hidden)
    gram_LHH = np.empty((layers, hidden, hidden), np.float32)
    for layer in range(layers):
        gram_LHH[layer][upper] = arrays[f"{_MOMENT}.{layer}"]
        gram_LHH[layer].T[upper] = arrays[f"{_MOMENT}.{layer}"]
    tokens = facts.pop(_COUNT)
    return GramStatistics(tokens, arrays[_SUM].reshape(layers, hidden), gram_LHH, facts)
