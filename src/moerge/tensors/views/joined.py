"""A tensor made of several, one after the other: what a fused layout stores as one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.codec import all_finite, decode
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.source import Source
from moerge.tensors.tensor import Elements, Sized, Tensor, windows

SEPARATOR = "+"
"""Between the names of the models that a joined tensor stems from; no name has it."""
_PIECE = 1 << 18
"""Elements that are converted or looked at in one go."""


@dataclass(frozen=True)
class Joined(Sized):
    """The elements of `parts` in order, row after row: in their own type if they share it, in float32 otherwise."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Source, ...] = field(repr=False)

    def __post_init__(self) -> None:
        assert sum(part.tensor.size for part in self.parts) == self.size, self.name

    @property
    def dtype(self) -> DType:
        """The parts' element type, or float32, which holds every other exactly."""
        types = {part.tensor.dtype for part in self.parts}
        return types.pop() if len(types) == 1 else F32

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """All files that the parts are read from."""
        return tuple(dict.fromkeys(file for part in self.parts for file in part.tensor.files))

    def open(self) -> JoinedElements:
        """Access to the elements; a part is opened when it is first read."""
        return JoinedElements(self)


class JoinedElements:
    """Access to an opened joined tensor."""

    def __init__(self, tensor: Joined) -> None:
        self._tensors = [part.tensor for part in tensor.parts]
        self._dtype = tensor.dtype
        self._ends = list(accumulate(part.size for part in self._tensors))
        self._opened: dict[int, Elements] = {}

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Fill `out_N` with elements `start` and following, and return it."""
        position, stop = start, start + out_N.size
        while position < stop:
            index = bisect_right(self._ends, position)
            end = min(self._ends[index], stop, position + _PIECE)
            begin = position - (self._ends[index] - self._tensors[index].size)
            self._read_part(index, begin, out_N[position - start : end - start])
            position = end
        return out_N

    def _read_part(self, index: int, begin: int, out_N: np.ndarray) -> None:
        tensor = self._tensors[index]
        if index not in self._opened:
            self._opened[index] = tensor.open()
        if tensor.dtype is self._dtype:
            found_N = self._opened[index].read(begin, out_N)
            if found_N is not out_N:
                out_N[:] = found_N
        else:
            decode(self._opened[index].read(begin, np.empty(out_N.size, tensor.dtype.storage)), tensor.dtype, out_N)


def joined(name: str, shape: tuple[int, ...], parts: Sequence[Source]) -> Source:
    """A source of the joined elements of several, named after all their models."""
    models = SEPARATOR.join(dict.fromkeys(part.model for part in parts))
    return Source(models, Joined(name, shape, tuple(parts)))


def nonfinite_source(source: Source) -> Source:
    """Find the source of NaN or infinity: of one that is made of `parts` the first that holds them."""
    parts: Sequence[Source] = getattr(source.tensor, "parts", ())
    found = next((part for part in parts if not _is_finite(part.tensor)), None)
    return source if found is None else nonfinite_source(found)


def _is_finite(tensor: Tensor) -> bool:
    return all(all_finite(piece_N, tensor.dtype) for piece_N in windows(tensor, _PIECE))
