"""The base of methods that set a part of each task vector to zero before they add them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from moerge.methods.formulas import elected_sum, keep_elected, weighted_sum
from moerge.methods.magnitude import kept_count
from moerge.methods.method import Block, TaskVectorMethod
from moerge.methods.values import Density, each
from moerge.tensors.kernels import kernel

RowScope = Literal["row", "tensor", "model"]


class SparseMethod(TaskVectorMethod):
    """theta = theta_base + scale * sum_k w_k sparse(tau_k), where a subclass says what sparse(tau_k) is.

    `density` is the fraction kept: one number, or one for each expert (a mapping of names, or a list in their order).
    `aggregate: mean` divides by the sum of the weights, after an election by the weights of those that agree and are not zero.
    """

    density: Density = 0.8
    aggregate: Literal["sum", "mean"] = "sum"

    @property
    def elects(self) -> bool:
        """Return whether TIES' election chooses among what is left."""
        return False

    @property
    def divides_by_weights(self) -> bool:
        """True for the mean of all task vectors; an elected mean divides by the weights of those that agree."""
        return self.aggregate == "mean" and not self.elects

    def sparsify(self, block: Block) -> None:
        """Set what is dropped of `block.theta_EN` to zero, and rescale the rest where the method does."""
        raise NotImplementedError

    def combine(self, block: Block) -> None:
        """Drop, then sum what agrees, or everything."""
        self.sparsify(block)
        if self.elects:
            elected_sum(block.theta_EN, block.weights_E, self.aggregate == "mean", block.out_N)
            return
        divisor = block.weights_E.sum(dtype=np.float64) if self.aggregate == "mean" else 1
        weighted_sum(block.theta_EN, block.weights_E, np.float32(divisor), block.out_N)

    def direct(self, block: Block) -> None:
        """Return the rest of each task vector; with an election, zero where the sign was not elected."""
        self.sparsify(block)
        if self.elects:
            keep_elected(block.theta_EN, block.weights_E)

    def kept(self, experts: int, size: int) -> list[int]:
        """Return the number of entries that each expert keeps."""
        return [kept_count(density, size) for density in each(self.density, experts)]


class ElectiveMethod(SparseMethod):
    """A sparse method that adds up all that is left, or, with `elect: sign`, what TIES' election chooses among it.

    mergekit calls the latter by the method's name with `_ties` at its end.
    """

    elect: Literal["none", "sign"] = "none"

    @property
    def elects(self) -> bool:
        """True with `elect: sign`."""
        return self.elect == "sign"


@kernel
def keep_between(tau_EN: np.ndarray, lowest_E: np.ndarray, highest_E: np.ndarray) -> None:
    """Set entries whose magnitude is below `lowest` or above `highest` to zero."""
    for k in range(len(lowest_E)):
        lowest, highest = lowest_E[k], highest_E[k]
        for i in range(tau_EN.shape[1]):
            tau = tau_EN[k, i]
            tau_EN[k, i] = np.float32(0) if (abs(tau) < lowest) | (abs(tau) > highest) else tau


def keep_ranks(tau_EN: np.ndarray, columns: int, ranks: Sequence[tuple[int, int]]) -> None:
    """Keep of each row the first to the last rank by magnitude (1 is the largest) and what equals them, for each expert."""
    for tau_N, (first, last) in zip(tau_EN, ranks, strict=True):
        if (first, last) == (1, columns):
            continue
        tau_RC = tau_N.reshape(-1, columns)
        places = columns - np.array([last, first])
        sorted_RC = np.partition(np.abs(tau_RC), np.unique(places), axis=1)
        for row_C, lowest, highest in zip(tau_RC, sorted_RC[:, places[0]], sorted_RC[:, places[1]], strict=True):
            keep_between(row_C[None], np.array([lowest]), np.array([highest]))
