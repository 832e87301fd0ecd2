"""Measuring passes: the blocks that a statistic reads, and the sum of their shares."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moerge.methods.method import Statistic
from moerge.operations.operations import Merge
from moerge.tensors.digest import CHUNK

RUN = 1 << 14
"""Elements in a run of a sample: long enough that reading it costs little more than its bytes."""


@dataclass(frozen=True)
class Piece:
    """Elements start .. stop of the tensors of one operation."""

    operation: Merge
    start: int
    stop: int


def chunked(operations: Sequence[Merge]) -> list[Piece]:
    """All elements of all operations, chunk by chunk."""
    return [
        Piece(operation, start, min(start + CHUNK, operation.experts[0].tensor.size))
        for operation in operations
        for start in range(0, operation.experts[0].tensor.size, CHUNK)
    ]


def sampled(operations: Sequence[Merge], runs: int) -> list[Piece]:
    """`runs` runs of elements, evenly spaced over all operations together."""
    sizes = np.array([operation.experts[0].tensor.size for operation in operations])
    ends = np.cumsum(sizes)
    pieces = []
    for run in range(runs):
        place = (2 * run + 1) * int(ends[-1]) // (2 * runs)
        index = int(np.searchsorted(ends, place, side="right"))
        start = max(0, min(place - int(ends[index] - sizes[index]), int(sizes[index]) - RUN))
        pieces.append(Piece(operations[index], start, min(start + RUN, int(sizes[index]))))
    return pieces


class OrderedSum:
    """Adds up pieces' shares in the order of their indices, whatever the order they arrive in."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.total = statistic.zeros()
        self._lock = threading.Lock()
        self._waiting: dict[int, Any] = {}
        self._spare: list[Any] = []
        self._next = 0

    def share(self) -> Any:
        """Zeros to add a piece's share to; the memory of shares that were already added is used again."""
        with self._lock:
            return self._spare.pop() if self._spare else self.statistic.zeros()

    def add(self, index: int, share: Any) -> None:
        """Piece number `index` has been looked at."""
        with self._lock:
            self._waiting[index] = share
            while self._next in self._waiting:
                arrived = self._waiting.pop(self._next)
                self.total += arrived
                self._next += 1
                _clear(arrived)
                self._spare.append(arrived)


def _clear(share: Any) -> None:
    if isinstance(share, np.ndarray):
        share.fill(0)
    else:
        share.clear()
