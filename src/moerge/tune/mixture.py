"""Which sequence comes when: a pure function of the seed, the weights and how much text each source has.

The i-th sequence of a run is drawn from source s with the probability of its weight; it is the j-th from there, so it is number
order(s, epoch)[j mod n] of that source's n sequences, epoch being j div n. Nothing depends on processes or on what ran before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from moerge.methods.random import stream_key


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
        u_N = _generator(self.seed, "draws").random(self.sequences)
        return np.searchsorted(np.cumsum(self.shares)[:-1], u_N, side="right").astype(np.int32)

    @cached_property
    def ordinals_N(self) -> np.ndarray:
        """How many sequences of the same source came before."""
        found_N = np.empty(self.sequences, np.int64)
        for number in range(len(self.names)):
            mine_N = self.drawn_N == number
            found_N[mine_N] = np.arange(int(mine_N.sum()))
        return found_N

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """How many sequences each source gives."""
        return tuple(int(count) for count in np.bincount(self.drawn_N, minlength=len(self.names)))

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
