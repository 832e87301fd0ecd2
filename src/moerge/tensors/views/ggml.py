"""Tensors in blocks of 32 elements as ggml stores them: Q8_0, Q4_0 and Q4_1, decoded where they are read.

A block begins with its scale d in float16; Q4_1 has the least value m behind it. Then come 32 signed bytes, or 16 bytes whose
lower halves are the first 16 codes and whose upper halves the others (ggml-quants.c). An element is d * code, d * (code - 8) or
d * code + m in float32, as the gguf package and transformers compute it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.kernels import kernel
from moerge.tensors.tensor import Elements, Sized, Tensor

BLOCK = 32
BLOCK_BYTES = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
"""Bytes of a block by type."""
_RUN = 1 << 16
"""Elements decoded at a time."""


@dataclass(frozen=True)
class BlockTensor(Sized):
    """A Tensor of float32 whose elements are in `stored`, the bytes of whole blocks of this `kind`."""

    name: str
    shape: tuple[int, ...]
    kind: str
    stored: Tensor

    @property
    def dtype(self) -> DType:
        """float32."""
        return F32

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The file of the blocks."""
        return self.stored.files

    def open(self) -> _BlockElements:
        """Access to the elements."""
        return _BlockElements(self.stored.open(), self.kind)


@dataclass(frozen=True)
class _BlockElements:
    stored: Elements
    kind: str

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        width = BLOCK_BYTES[self.kind]
        for done in range(0, out_N.size, _RUN):
            part_N = out_N[done : done + _RUN]
            begin = start + done
            block, offset = divmod(begin, BLOCK)
            count = -(-(begin + part_N.size) // BLOCK) - block
            stored_BW = self.stored.read(block * width, np.empty(count * width, np.uint8)).reshape(count, width)
            scale_B = stored_BW[:, :2].copy().view("<f2")[:, 0].astype(np.float32)
            least_B = stored_BW[:, 2:4].copy().view("<f2")[:, 0].astype(np.float32) if self.kind == "Q4_1" else scale_B
            _DECODERS[self.kind](stored_BW, scale_B, least_B, offset, part_N)
        return out_N


@kernel
def _q8_0(stored_BW: np.ndarray, scale_B: np.ndarray, least_B: np.ndarray, offset: int, out_N: np.ndarray) -> None:
    for n in range(out_N.size):
        block, place = (n + offset) >> 5, (n + offset) & 31
        out_N[n] = scale_B[block] * np.float32(np.int8(stored_BW[block, 2 + place]))


@kernel
def _q4_0(stored_BW: np.ndarray, scale_B: np.ndarray, least_B: np.ndarray, offset: int, out_N: np.ndarray) -> None:
    for n in range(out_N.size):
        block, place = (n + offset) >> 5, (n + offset) & 31
        code = (stored_BW[block, 2 + (place & 15)] >> (place >> 4 << 2)) & 15
        out_N[n] = scale_B[block] * np.float32(np.int32(code) - 8)


@kernel
def _q4_1(stored_BW: np.ndarray, scale_B: np.ndarray, least_B: np.ndarray, offset: int, out_N: np.ndarray) -> None:
    for n in range(out_N.size):
        block, place = (n + offset) >> 5, (n + offset) & 31
        code = (stored_BW[block, 4 + (place & 15)] >> (place >> 4 << 2)) & 15
        out_N[n] = scale_B[block] * np.float32(code) + least_B[block]


_DECODERS = {"Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1}
