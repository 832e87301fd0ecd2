"""How far two checkpoints' tensors lie apart, in units in the last place of a bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moerge.checkpoint.header import StoredTensor
from moerge.checkpoint.reader import open_folder


def distance(one: Path, other: Path) -> dict[str, float]:
    """The largest distance in ulps and as a number, and the shares of elements that differ at all and by more than one ulp.

    Ulps of numbers that nearly cancelled are tiny, so that a last-bit difference of the terms is many of them.
    """
    first, second = open_folder(one).tensors, open_folder(other).tensors
    if first.keys() != second.keys():
        raise RuntimeError(f"different tensors: {sorted(first.keys() ^ second.keys())[:3]}")
    largest, absolute, differing, far, total = 0, 0.0, 0, 0, 0
    for name, tensor in first.items():
        bits, others = _bits(tensor), _bits(second[name])
        ulps = np.abs(_ordered(bits) - _ordered(others))
        absolute = max(absolute, float(np.abs(_value(bits) - _value(others)).max(initial=0)))
        largest = max(largest, int(ulps.max(initial=0)))
        differing += int(np.count_nonzero(ulps))
        far += int(np.count_nonzero(ulps > 1))
        total += ulps.size
    return {"largest_ulps": largest, "largest": absolute, "share_differing": differing / total, "share_beyond_1_ulp": far / total}


def _bits(tensor: StoredTensor) -> np.ndarray:
    return np.fromfile(tensor.file, np.uint16, tensor.size, offset=tensor.offset)


def _value(bits_N: np.ndarray) -> np.ndarray:
    return (bits_N.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _ordered(bits_N: np.ndarray) -> np.ndarray:
    """Integers in the order of the bfloat16 numbers, neighbours one apart, both zeros at 0."""
    magnitude_N = (bits_N & np.uint16(0x7FFF)).astype(np.int32)
    return np.where(bits_N >> np.uint16(15), -magnitude_N, magnitude_N)
