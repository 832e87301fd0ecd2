"""Task vectors, read from disk each time they are needed: one tensor of every expert is in memory, never a model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from moerge.checkpoint.tensor import Tensor
from moerge.errors import InputError
from moerge.methods.codec import decode
from moerge.methods.method import Block, TaskVectorMethod
from moerge.methods.random import stream_key

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 20
"""Elements read at a time."""


def read_values(tensor: Tensor, base_N: np.ndarray | None = None) -> np.ndarray:
    """All elements as float32, flat; with `base_N`, their differences to it. InputError for NaN and infinity."""
    values_N = np.empty(tensor.size, np.float32)
    elements = tensor.open()
    for start in range(0, tensor.size, _PIECE):
        stop = min(start + _PIECE, tensor.size)
        piece = elements.read(start, np.empty(stop - start, tensor.dtype.storage))
        if not decode(piece, tensor.dtype, values_N[start:stop], None if base_N is None else base_N[start:stop]):
            raise InputError(f"tensor {tensor.name!r} holds NaN or infinity: repair or drop this expert")
    return values_N


@dataclass(frozen=True)
class Directions:
    """The task vectors of one tensor as the merge method sees them: trimmed, elected or thinned out.

    `experts` are the K experts' tensors under `names`, `base` the base's.
    """

    name: str
    base: Tensor
    experts: tuple[Tensor, ...]
    names: tuple[str, ...]
    method: TaskVectorMethod
    pool: ThreadPoolExecutor
    statistic: Any = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.base.size

    def raw(self) -> np.ndarray:
        """theta_k - theta_base [K, N] as float32, nothing trimmed."""
        return self._differences(read_values(self.base))

    def read(self) -> np.ndarray:
        """tau [K, N] as float32."""
        base_N = read_values(self.base)
        tau_KN = self._differences(base_N)
        seed = self.method.random_seed
        keys = (
            []
            if seed is None
            else [stream_key(seed, name, tensor.name) for name, tensor in zip(self.names, self.experts, strict=True)]
        )
        weights_K = np.ones(len(self.names), np.float32)
        keys_K = np.array(keys, np.uint64)
        shape = self.base.shape
        rows = (self.size // shape[-1], shape[-1]) if self.method.unit == "rows" and len(shape) > 1 else (1, self.size)
        self.method.direct(Block(tau_KN, weights_K, base_N, base_N, self.statistic, keys_K, 0, rows))
        return tau_KN

    def norms(self) -> list[float]:
        """||tau_k||, the Frobenius norm for each expert."""
        return [float(np.sqrt(np.dot(tau_N, tau_N))) for tau_N in self.read().astype(np.float64)]

    def _differences(self, base_N: np.ndarray) -> np.ndarray:
        return np.stack(list(self.pool.map(lambda tensor: read_values(tensor, base_N), self.experts)))


def merged(base: torch.Tensor, directions: Directions, coefficients_KC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """theta_base + sum_k c_k tau_k as `dtype`, computed in float32, or in float64 for float64; on the coefficients' device."""
    import torch

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    theta_N = base.detach().to(coefficients_KC.device, wide, copy=True).reshape(-1)
    for tau_N, row_C in zip(_tensors(directions, theta_N), coefficients_KC.to(wide), strict=True):
        for part_M, tau_M, c in zip(theta_N.chunk(len(row_C)), tau_N.chunk(len(row_C)), row_C, strict=True):
            part_M.add_(tau_M, alpha=float(c))
    return theta_N.view(base.shape).to(dtype)


def inner_products(gradient: torch.Tensor, directions: Directions, chunks: int) -> torch.Tensor:
    """<dL/dtheta, tau_k> over each chunk, [K, C]: the gradient of the coefficients, which is all that learning needs."""
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
