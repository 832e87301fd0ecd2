"""Reading sources in order, digested on the way: a window at a time, whatever the size of the tensor."""

from __future__ import annotations

from typing import Any

import numpy as np

from moerge.checkpoint.digest import CHUNK, TensorDigest, running_digest
from moerge.methods.codec import decode
from moerge.planning.operations import Source

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
    """A source from its first element to its last, in steps of any length."""

    def __init__(self, source: Source, buffer_N: np.ndarray) -> None:
        self.source = source
        self._elements, self._buffer_N, self._next = source.tensor.open(), buffer_N, 0
        self._digest = TensorDigest()

    def fill(self, out_N: np.ndarray, base_N: Any = None) -> bool:
        """The next elements as float32, less `base_N` if that is given; True if all of them are finite."""
        finite = True
        for begin in range(0, out_N.size, WINDOW):
            part = slice(begin, min(begin + WINDOW, out_N.size))
            stored_N = self._elements.read(self._next, self._buffer_N[: part.stop - begin])
            self._digest.update(stored_N)
            self._next += stored_N.size
            finite &= decode(stored_N, self.source.tensor.dtype, out_N[part], None if base_N is None else base_N[part])
        return finite

    def digest(self) -> str:
        """The digest of the whole tensor."""
        assert self._next == self.source.tensor.size
        return self._digest.digest()
