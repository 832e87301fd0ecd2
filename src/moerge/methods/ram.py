"""Reinforced agent merging: what one expert alone changed is kept whole, what several changed is averaged."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, Finite, Measurement, Scope, Statistic, TaskVectorMethod
from moerge.tensors.kernels import STRIP, kernel

_NotNegative = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]


class Ram(TaskVectorMethod):
    """theta = theta_base + scale * sum_k tau_k [|tau_k| > epsilon] / n, n the number of experts that changed the entry so much.

    Yuan et al. 2026, *Behavior Knowledge Merge in Reinforced Agentic Models* (arXiv 2601.13572), section 4: what one expert
    alone changed is its own, what several changed is the mean of their changes.

    Not for supervised fine-tuning, which changes nearly every entry: with all entries shared it is the average.
    """

    name: ClassVar[str] = "ram"
    uses_weights: ClassVar[bool] = False
    scale: Finite = 1.0
    epsilon: _NotNegative = 1e-5

    def combine(self, block: Block) -> None:
        """The sum of what is left of the task vectors."""
        self.direct(block)
        weighted_sum(block.theta_EN, np.ones(len(block.theta_EN), np.float32), np.float32(1), block.out_N)

    def direct(self, block: Block) -> None:
        """Each change divided by the number of those who made one."""
        _divide(block.theta_EN, np.float32(self.epsilon), self.stretched(block))

    def stretched(self, block: Block) -> np.ndarray:
        """Return the factor of each expert's own changes, float32 [E]."""
        return np.ones(len(block.theta_EN), np.float32)


class RamPlus(Ram):
    """theta = theta_base + scale * sum_k lambda_k tau_k where expert k alone changed an entry, the mean where several did.

    lambda_k = 1 + r * min(alpha, shared_k / own_k), with the numbers of entries that expert k changed (|tau_k| > epsilon) as
    others did and alone: RAM+ of Yuan et al. 2026 (arXiv 2601.13572, section 4), which makes up for what averaging takes. They
    are counted in each tensor, as in mergekit's `ramplus_tl`, or with `scope: model` in the whole model, as in the paper.

    Not for supervised fine-tuning, which changes nearly every entry: little is an expert's own.
    """

    name: ClassVar[str] = "ramplus_tl"
    r: _NotNegative = 0.1
    alpha: _NotNegative = 0.2
    scope: Scope = "tensor"

    @property
    def measures(self) -> int:
        """One pass."""
        return 1

    @property
    def spans_model(self) -> bool:
        """True with `scope: model`."""
        return self.scope == "model"

    def measure(self, experts: int, size: int) -> Measurement:
        """lambda, float32 [E]."""
        add = partial(_count, np.float32(self.epsilon))
        shared_E, own_E = (yield Statistic(partial(np.zeros, (2, experts), np.int64), add)).astype(np.float64)
        ratio_E = np.divide(shared_E, own_E, out=np.zeros(experts), where=own_E > 0)
        return (1 + self.r * np.minimum(self.alpha, ratio_E)).astype(np.float32)

    def stretched(self, block: Block) -> np.ndarray:
        """lambda."""
        lambda_E: np.ndarray = block.statistic
        return lambda_E


def _count(epsilon: np.float32, tau_EN: np.ndarray, total_2E: np.ndarray) -> None:
    _count_changes(tau_EN, epsilon, total_2E)


@kernel
def _changes(tau_ES: np.ndarray, epsilon: np.float32, counts: np.ndarray) -> None:
    counts[:] = np.float32(0)
    for k in range(len(tau_ES)):
        for i in range(tau_ES.shape[1]):
            counts[i] += np.float32(abs(tau_ES[k, i]) > epsilon)


@kernel
def _count_changes(tau_EN: np.ndarray, epsilon: np.float32, total_2E: np.ndarray) -> None:
    counts = np.empty(STRIP, np.float32)
    for start in range(0, tau_EN.shape[1], STRIP):
        tau_ES = tau_EN[:, start : start + STRIP]
        _changes(tau_ES, epsilon, counts)
        for k in range(len(tau_ES)):
            shared, own = 0, 0
            for i in range(tau_ES.shape[1]):
                changed = abs(tau_ES[k, i]) > epsilon
                shared += changed & (counts[i] > np.float32(1))
                own += changed & (counts[i] == np.float32(1))
            total_2E[0, k] += shared
            total_2E[1, k] += own


@kernel
def _divide(tau_EN: np.ndarray, epsilon: np.float32, lambda_E: np.ndarray) -> None:
    counts = np.empty(STRIP, np.float32)
    for start in range(0, tau_EN.shape[1], STRIP):
        tau_ES = tau_EN[:, start : start + STRIP]
        _changes(tau_ES, epsilon, counts)
        for k in range(len(tau_ES)):
            own = lambda_E[k]
            for i in range(tau_ES.shape[1]):
                tau = tau_ES[k, i]
                share = tau * own if counts[i] == np.float32(1) else tau / counts[i]
                tau_ES[k, i] = share if abs(tau) > epsilon else np.float32(0)
