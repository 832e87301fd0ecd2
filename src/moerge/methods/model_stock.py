"""Model stock."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, Measurement, MergeMethod, Statistic, Unit
from moerge.methods.products import LANES, add_products


class ModelStock(MergeMethod):
    """theta = theta_base + t * mean_k tau_k, t = K cos / (1 + (K - 1) cos), cos the cosine between task vectors.

    Jang et al. 2024, *Model Stock*, section 4.2, for each tensor. Of more than two experts cos is the mean over pairs, as in
    mergekit (FusionBench averages angles instead, the same for two). `filter_wise` takes one t for each row, mergekit's option
    of that name. A negative cosine, for which the paper's geometry means nothing, gives t = 0, the base; mergekit extrapolates
    to the other side of it, without bound as cos nears -1 / (K - 1).

    Not for experts of different tasks: their task vectors are near orthogonal, so the result is near the base. It is meant for
    fine-tunings of one task that differ in seeds and settings.
    """

    name: ClassVar[str] = "model_stock"
    uses_task_vectors: ClassVar[bool] = True
    uses_weights: ClassVar[bool] = False
    filter_wise: bool = False

    @property
    def unit(self) -> Unit:
        """Rows with `filter_wise`."""
        return "rows" if self.filter_wise else "block"

    @property
    def measures(self) -> int:
        """One pass, none for rows."""
        return 0 if self.filter_wise else 1

    def measure(self, experts: int, size: int) -> Measurement:
        """The ratio t."""
        products_KKL = yield Statistic(partial(np.zeros, (experts, experts, LANES)), add_products)
        return _ratio(products_KKL)

    def merge(self, block: Block) -> None:
        """The mean task vector, shortened, from the base on."""
        experts = len(block.theta_KN)
        weighted_sum(block.theta_KN, np.ones(experts, np.float32), np.float32(experts), block.out_N)
        if not self.filter_wise:
            np.multiply(block.out_N, block.statistic, out=block.out_N)
        else:
            for columns, out_C in zip(
                np.split(block.theta_KN, block.shape[0], axis=1), block.out_N.reshape(block.shape), strict=True
            ):
                products_KKL = np.zeros((experts, experts, LANES))
                add_products(np.ascontiguousarray(columns), products_KKL)
                np.multiply(out_C, _ratio(products_KKL), out=out_C)
        np.add(block.base_N, block.out_N, out=block.out_N)


def _ratio(products_KKL: np.ndarray) -> np.float32:
    """t from the products of all pairs of task vectors; a pair of which one is zero has the cosine 0, a single expert t = 1."""
    products_KK = products_KKL.sum(axis=2)
    experts = len(products_KK)
    if experts == 1:
        return np.float32(1)
    norms_K = np.sqrt(np.diagonal(products_KK))
    norms_KK = np.outer(norms_K, norms_K)
    cosines_KK = np.divide(products_KK, norms_KK, out=np.zeros_like(products_KK), where=norms_KK > 0)
    cosine = max(0.0, float(cosines_KK[np.triu_indices(experts, 1)].mean()))
    return np.float32(experts * cosine / (1 + (experts - 1) * cosine))
