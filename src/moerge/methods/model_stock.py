"""Model stock."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, Measurement, MergeMethod, Statistic, Unit
from moerge.methods.products import LANES, add_products


class ModelStock(MergeMethod):
    """theta = theta_base + t * mean_k tau_k, t = E cos / (1 + (E - 1) cos), cos the cosine between task vectors.

    Jang et al. 2024, *Model Stock*, section 4.2, for each tensor. Of more than two experts cos is the mean over pairs, as in
    mergekit (FusionBench averages angles instead, the same for two). `filter_wise` takes one t for each row, mergekit's option
    of that name. A negative cosine, for which the paper's geometry means nothing, gives t = 0, the base; mergekit extrapolates
    to the other side of it, without bound as cos nears -1 / (E - 1).

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
        products_EEL = yield Statistic(partial(np.zeros, (experts, experts, LANES)), add_products)
        return _ratio(products_EEL)

    def merge(self, block: Block) -> None:
        """The mean task vector, shortened, from the base on."""
        experts = len(block.theta_EN)
        weighted_sum(block.theta_EN, np.ones(experts, np.float32), np.float32(experts), block.out_N)
        if not self.filter_wise:
            np.multiply(block.out_N, block.statistic, out=block.out_N)
        else:
            for columns, out_C in zip(
                np.split(block.theta_EN, block.shape[0], axis=1), block.out_N.reshape(block.shape), strict=True
            ):
                products_EEL = np.zeros((experts, experts, LANES))
                add_products(np.ascontiguousarray(columns), products_EEL)
                np.multiply(out_C, _ratio(products_EEL), out=out_C)
        np.add(block.base_N, block.out_N, out=block.out_N)


def _ratio(products_EEL: np.ndarray) -> np.float32:
    """t from the products of all pairs of task vectors; a pair of which one is zero has the cosine 0, a single expert t = 1."""
    products_EE = products_EEL.sum(axis=2)
    experts = len(products_EE)
    if experts == 1:
        return np.float32(1)
    norms_E = np.sqrt(np.diagonal(products_EE))
    norms_EE = np.outer(norms_E, norms_E)
    cosines_EE = np.divide(products_EE, norms_EE, out=np.zeros_like(products_EE), where=norms_EE > 0)
    cosine = max(0.0, float(cosines_EE[np.triu_indices(experts, 1)].mean()))
    return np.float32(experts * cosine / (1 + (experts - 1) * cosine))
