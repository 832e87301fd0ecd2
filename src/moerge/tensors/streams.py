"""Reading sources in order, digested on the way: a window at a time, whatever the size of the tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.tensors.codec import decode
from moerge.tensors.digest import CHUNK, TensorDigest, running_digest
from moerge.tensors.source import Source
from moerge.tensors.tensor import Tensor, windows
from moerge.tensors.views.joined import nonfinite_source

BLOCK = 1 << 17
"""Elements a block: its float32 copies stay in the shared cache, and calling kernels costs little beside running them."""
WINDOW = 1 << 18
"""Elements read or written by one system call."""
assert CHUNK % WINDOW == WINDOW % BLOCK == BLOCK % 2 == 0


class Reader:
    """Elements start .. stop of a source, taken in order."""

    def __init__(self, source: Source, start: int, stop: int, buffer_N: np.ndarray) -> None:
        self.source, self.dtype = source, source.tensor.dtype
        self._elements, self._buffer_N = source.tensor.open(), buffer_N
        self._window_N, self._start, self._end, self._stop = buffer_N[:0], start, start, stop
        self._digest = running_digest()

    def take(self, start: int, stop: int) -> np.ndarray:
        """Elements start .. stop, valid until the next call; the range lies within one window."""
        if not self._start <= start <= stop <= self._end:
            count = min(WINDOW, self._stop - start)
            self._window_N = self._elements.read(start, self._buffer_N[:count])
            self._start, self._end = start, start + count
            self._digest.update(self._window_N)
        return self._window_N[start - self._start : stop - self._start]

    def digest(self) -> bytes:
        """The digest of everything taken."""
        digest: bytes = self._digest.digest()
        return digest

    def bytes_of(self, elements: int) -> int:
        """Bytes that so many elements occupy."""
        return elements * self.dtype.itemsize


class Stream:
    """A source from its first element to its last, in steps of any length. Without `digested` it has no digest."""

    def __init__(self, source: Source, buffer_N: np.ndarray | None = None, *, digested: bool = True) -> None:
        self.source, self._elements, self._next = source, source.tensor.open(), 0
        window = min(WINDOW, source.tensor.size)
        self._buffer_N = np.empty(window, source.tensor.dtype.storage) if buffer_N is None else buffer_N
        self._digest = TensorDigest() if digested else None

    def fill(self, out_N: np.ndarray, base_N: Any = None) -> bool:
        """The next elements as float32, less `base_N` if that is given; True if all of them are finite."""
        finite = True
        for begin in range(0, out_N.size, WINDOW):
            part = slice(begin, min(begin + WINDOW, out_N.size))
            stored_N = self._elements.read(self._next, self._buffer_N[: part.stop - begin])
            if self._digest is not None:
                self._digest.update(stored_N)
            self._next += stored_N.size
            finite &= decode(stored_N, self.source.tensor.dtype, out_N[part], None if base_N is None else base_N[part])
        return finite

    def fill_finite(self, out_N: np.ndarray, base_N: np.ndarray | None = None) -> None:
        """Fill as `fill` does; InputError for NaN and infinity."""
        if not self.fill(out_N, base_N):
            blamed = nonfinite_source(self.source)
            raise InputError(f"{blamed.model}: tensor {blamed.tensor.name!r} holds NaN or infinity: repair it first")

    def digest(self) -> str:
        """The digest of the whole tensor."""
        assert self._digest is not None and self._next == self.source.tensor.size
        return self._digest.digest()


def read_values(source: Source, base_N: np.ndarray | None = None, out_N: np.ndarray | None = None) -> np.ndarray:
    """All elements as float32, flat, in `out_N` if that is given; less `base_N` if that is given.

    Raises InputError for NaN and infinity.
    """
    values_N = np.empty(source.tensor.size, np.float32) if out_N is None else out_N
    Stream(source, digested=False).fill_finite(values_N, base_N)
    return values_N


def same_values(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same values; they are read window by window, up to the first difference.

    Elements of one type are compared by their bits, those of different float types as float32.
    """
    if first is second or first.shape != second.shape:
        return first is second
    for one_N, other_N in zip(windows(first, CHUNK), windows(second, CHUNK), strict=True):
        if first.dtype is not second.dtype:
            one_N, other_N = _as_float32(one_N, first), _as_float32(other_N, second)
        if one_N.tobytes() != other_N.tobytes():
            return False
    return True


def _as_float32(stored_N: np.ndarray, tensor: Tensor) -> np.ndarray:
    values_N = np.empty(stored_N.size, np.float32)
    decode(stored_N, tensor.dtype, values_N)
    return values_N
