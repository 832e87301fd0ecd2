"""Task vectors, read from disk each time they are needed: one tensor of every expert is in memory, never a model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moerge.methods.method import Block, TaskVectorMethod
from moerge.operations.estimate import columns_of
from moerge.operations.operations import Merge
from moerge.tensors.source import Source
from moerge.tensors.streams import read_values

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Directions:
    """The task vectors of a tensor's merge as its method sees them: trimmed, elected or thinned out.

    `statistic` is what the method measured before.
    """

    merge: Merge
    pool: ThreadPoolExecutor
    statistic: Any = None

    @property
    def base(self) -> Source:
        """The base's tensor."""
        assert self.merge.base is not None
        return self.merge.base

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.tensor.size

    def read(self) -> np.ndarray:
        """tau [E, N] as float32."""
        merge, method = self.merge, self.merge.method
        assert isinstance(method, TaskVectorMethod)
        base_N, columns = read_values(self.base), columns_of(self.base.tensor.shape)
        tau_EN = np.empty((len(merge.experts), self.size), np.float32)
        list(self.pool.map(lambda expert, tau_N: read_values(expert, base_N, tau_N), merge.experts, tau_EN))
        shape = (self.size // max(1, columns), columns)
        method.direct(Block(tau_EN, merge.weights_E, base_N, base_N, self.statistic, merge.keys_E, 0, shape))
        return tau_EN

    def norms(self) -> list[float]:
        """||tau_k||, the Frobenius norm for each expert."""
        # not by BLAS, whose sums depend on its threads
        return [float(np.sqrt(np.square(tau_N, dtype=np.float64).sum())) for tau_N in self.read()]


def merged(base: torch.Tensor, directions: Directions, coefficients_EC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """theta_base + sum_k c_k tau_k as `dtype`, computed in float32, or in float64 for float64; on the coefficients' device."""
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theta_N = base.detach().to(coefficients_EC.device, wide, copy=True).reshape(-1)
    for tau_N, row_C in zip(_tensors(directions, theta_N), coefficients_EC.to(wide), strict=True):
        for part_M, tau_M, c in zip(theta_N.chunk(len(row_C)), tau_N.chunk(len(row_C)), row_C, strict=True):
            part_M.add_(tau_M, alpha=float(c))
    return theta_N.view(base.shape).to(dtype)


def inner_products(gradient: torch.Tensor, directions: Directions, chunks: int) -> torch.Tensor:
    """<dL/dtheta, tau_k> over each chunk, [E, C]: the gradient of the coefficients, which is all that learning needs."""
    import torch

    gradient_N = gradient.detach().reshape(-1)
    gradient_N = gradient_N if gradient_N.dtype == torch.float64 else gradient_N.float()
    rows = [
        torch.stack([torch.dot(g, tau) for g, tau in zip(gradient_N.chunk(chunks), tau_N.chunk(chunks), strict=True)])
        for tau_N in _tensors(directions, gradient_N)
    ]
    return torch.stack(rows)


def _tensors(directions: Directions, like: torch.Tensor) -> Sequence[torch.Tensor]:
    import torch

    return [torch.from_numpy(tau_N).to(like.device, like.dtype) for tau_N in directions.read()]
