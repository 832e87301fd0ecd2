"""The artefact of learning: coefficients by tensor and expert, as JSON that needs no torch to be read or merged with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerge.checkpoint.reader import read_json
from moerge.errors import InputError
from moerge.files import atomic_write, is_file

FORMAT = 1
FILE = "coefficients.json"

_LARGEST = 2.0**128 - 2.0**104
"""The largest float32 below infinity, since merging computes in float32."""


@dataclass(frozen=True)
class Coefficients:
    """theta_merged[p] = theta_base[p] + sum_k c[p][k] * tau_k[p], and `fixed` for tensors that are not in `by_tensor`.

    `by_tensor` maps a tensor's name to K rows of C coefficients, one for each of C contiguous chunks of the flattened tensor,
    cut as torch.chunk does; `chunk_sizes` has the elements of each chunk of tensors with more than one. `directions` is the
    merge method, with its settings, whose trimmed task vectors the tau_k are.
    """

    experts: tuple[str, ...]
    by_tensor: Mapping[str, tuple[tuple[float, ...], ...]]
    chunk_sizes: Mapping[str, int]
    fixed: float
    directions: Mapping[str, Any]
    learning: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the file's content."""
        return {
            "format": FORMAT,
            "experts": list(self.experts),
            "directions": dict(self.directions),
            "fixed": self.fixed,
            "coefficients": {name: [list(row) for row in rows] for name, rows in self.by_tensor.items()},
            "chunk_sizes": dict(self.chunk_sizes),
            "learning": dict(self.learning),
        }

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all. MachineError if it cannot be written."""
        atomic_write(path, to_json(self.to_json()))

    def means(self) -> dict[str, float]:
        """The mean coefficient of each expert over tensors."""
        rows = self.by_tensor.values()
        return {name: sum(sum(r[k]) / len(r[k]) for r in rows) / max(1, len(rows)) for k, name in enumerate(self.experts)}


def to_json(value: Mapping[str, Any]) -> bytes:
    """The file's text."""
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def chunk_size(size: int, chunks: int) -> int:
    """Elements of each chunk but the last, as torch.chunk cuts."""
    return math.ceil(size / chunks)


def chunk_count(size: int, chunks: int) -> int:
    """Return the number of chunks that a tensor of `size` elements is really cut into: torch.chunk may return fewer than
    asked for.
    """
    return math.ceil(size / chunk_size(size, chunks))


def read_coefficients(path: Path) -> Coefficients:
    """A file that `moerge learn` wrote; InputError if it is missing or damaged."""
    data = read_json(path) if is_file(path) else None
    if data is None:
        raise InputError(f"{path} is missing: `moerge learn` writes it, as {FILE} in the checkpoint's folder")
    try:
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r}")
        experts = tuple(str(name) for name in data["experts"])
        by_tensor = {str(name): _rows(rows, len(experts)) for name, rows in data["coefficients"].items()}
        chunk_sizes = {str(name): int(size) for name, size in data["chunk_sizes"].items()}
        if any((len(rows[0]) > 1) != (chunk_sizes.get(name, 0) > 0) for name, rows in by_tensor.items()):
            raise ValueError("chunk_sizes should name the tensors with several chunks")
        fixed, directions, learning = _number(data["fixed"]), data["directions"], data.get("learning", {})
        if not isinstance(directions, dict) or not isinstance(directions.get("method"), str):
            raise ValueError("directions should name a method")
        if not isinstance(learning, dict):
            raise ValueError("learning should be a mapping")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is damaged, or was written by another version of moerge ({error}): learn again", code="damaged-file"
        ) from None
    return Coefficients(experts, by_tensor, chunk_sizes, fixed, directions, learning)


def _rows(rows: Any, experts: int) -> tuple[tuple[float, ...], ...]:
    found = tuple(tuple(_number(value) for value in row) for row in rows)
    if len(found) != experts or len({len(row) for row in found}) != 1 or not found[0]:
        raise ValueError(f"{len(found)} rows of coefficients for {experts} experts")
    return found


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST:
        raise ValueError(f"{value!r} is not a number")
    return float(value)
