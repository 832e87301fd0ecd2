"""The order of sequences: a pure function of the seed, the weights and how much text each source has.

The i-th sequence of a run is drawn from source s with the probability of its weight; it is the j-th from there, so it is number
order(s, epoch)[j mod n] of that source's n sequences, epoch being j div n. Nothing depends on processes or on what ran before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from moerge.tensors.random import stream_key

_BLOCK = 1 << 20
"""Sequences drawn at a time."""


@dataclass(frozen=True)
class Mixture:
    """The draws of a run of `sequences` sequences."""

    weights: Mapping[str, float]
    sequences: int
    seed: int
    shuffle: bool = True

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The sources, in the order of their numbers."""
        return tuple(self.weights)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Probabilities of the sources: their weights divided by the sum."""
        total = sum(self.weights.values())
        return tuple(weight / total for weight in self.weights.values())

    @cached_property
    def drawn_N(self) -> np.ndarray:
        """The source's number of each sequence. Longer runs start with the same draws."""
        generator, edges = _generator(self.seed, "draws"), np.cumsum(self.shares)[:-1]
        found_N = np.empty(self.sequences, np.int32)
        for start in range(0, self.sequences, _BLOCK):
            block_N = found_N[start : start + _BLOCK]
            block_N[:] = np.searchsorted(edges, generator.random(len(block_N)), side="right")
        return found_N

    @cached_property
    def ordinals_N(self) -> np.ndarray:
        """Return the number of earlier sequences of the same source."""
        found_N = np.empty(self.sequences, np.int32)
        for number in range(len(self.names)):
            mine_N = self.drawn_N == number
            found_N[mine_N] = np.arange(np.count_nonzero(mine_N), dtype=np.int32)
        return found_N

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Return the number of sequences of each source."""
        return tuple(int(np.count_nonzero(self.drawn_N == number)) for number in range(len(self.names)))

    def used(self, source: int, available: int) -> tuple[int, ...]:
        """Return which of a source's `available` sequences are drawn at all, in their order."""
        count = self.counts[source]
        if count >= available or not self.shuffle:
            return tuple(range(min(count, available)))
        return tuple(sorted(_order(self.seed, self.names[source], 0, available)[:count].tolist()))

    def place(self, sequence: int, available: Sequence[int]) -> tuple[int, int]:
        """Source and number within it of a sequence, where the sources have `available` sequences each."""
        source, ordinal = int(self.drawn_N[sequence]), int(self.ordinals_N[sequence])
        epoch, index = divmod(ordinal, available[source])
        if not self.shuffle:
            return source, index
        return source, int(_order(self.seed, self.names[source], epoch, available[source])[index])


@lru_cache(maxsize=64)
def _order(seed: int, name: str, epoch: int, available: int) -> np.ndarray:
    return _generator(seed, "order", name, str(epoch)).permutation(available)


def _generator(seed: int, *names: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=int(stream_key(seed, "tune", *names))))
