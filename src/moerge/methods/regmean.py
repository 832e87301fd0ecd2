"""RegMean. Shapes: E experts, O outputs and I inputs of a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moerge.errors import InputError
from moerge.methods.method import Block, Unit
from moerge.methods.statistical import StatisticsMethod
from moerge.tensors.kernels import kernel
from moerge.tensors.views.scaled import Scaled

if TYPE_CHECKING:
    from moerge.statistics.files import Statistics
    from moerge.tensors.tensor import Tensor

_NO_GRAM = "regmean: what the statistics hold for a layer is no sum of x^T x: gather them again with 'moerge stats --force'"
_ALPHA = 1 - 1e-5
"""Gram matrices are sums in float32: directions that text hardly excites are rounding errors, which more would amplify."""


class RegMean(StatisticsMethod):
    """W = (sum_k w_k G_k)^-1 sum_k w_k G_k W_k, where G_k = X_k^T X_k for the inputs X_k that a layer has in expert k.

    It minimises sum_k w_k |X_k W - X_k W_k|^2 (Jin et al. 2023, arXiv 2212.09849, equation 2). Entries of G off the diagonal
    are multiplied by `alpha` first (their section 3.2, 0.1 to 0.9); 1 is taken as 0.99999, which makes layers solvable that
    text does not determine. With `balance` G is the mean over tokens, so that every expert counts the same however much text
    it has; without, the sum. Only linear layers are merged this way; biases, norms and embeddings are averaged, as in the
    paper. Inputs that are always zero keep the average.

    Not where only a few texts are at hand for wide layers, nor where experts' hidden states differ much: each layer is
    regressed on its own expert's inputs, not on what the merged layers below make of them.
    """

    name: ClassVar[str] = "regmean"
    kind: ClassVar[Literal["fisher", "gram"]] = "gram"
    input_axis: ClassVar[int] = 1
    alpha: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.9
    balance: bool = True

    @property
    def unit(self) -> Unit:
        """The whole tensor."""
        return "tensor"

    def scratch_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Two float64 matrices II, the sum with one of its terms or LAPACK's copy, and four OI."""
        inputs = shape[self.input_axis]
        return 8 * (2 * inputs * inputs + 4 * math.prod(shape))

    def prepared(self, statistics: Statistics, tensor: str) -> Tensor | None:
        """The upper triangle of a layer's Gram matrix, I * (I + 1) / 2 elements."""
        stored = statistics.gram(tensor)
        return None if stored is None else Scaled(stored, tensor, 1 / statistics.facts.tokens if self.balance else 1.0)

    def adapted(self, statistics: Statistics, tensor: str) -> StatisticsMethod:
        """Transpose for weights that are stored the other way round, as GPT-2's are."""
        if statistics.facts.grams[tensor].axis == self.input_axis:
            return self
        return InputsFirst(**self.model_dump())

    def fits(self, statistic: Tensor, shape: tuple[int, ...]) -> bool:
        """Return whether the Gram matrix has the layer's number of inputs."""
        return len(shape) == 2 and statistic.size == triangle(shape[self.input_axis])

    def merge(self, block: Block) -> None:
        """Solve for the difference to the average, which is zero in every direction that nobody's inputs have."""
        theta_EOI = block.theta_EN.reshape(-1, *block.shape)
        if self.input_axis == 0:
            theta_EOI = theta_EOI.transpose(0, 2, 1)
        weights_E = block.weights_E.astype(np.float64)
        average_OI = np.zeros(theta_EOI[0].shape)
        for weight, theta_OI in zip(weights_E, theta_EOI, strict=True):
            average_OI += weight / weights_E.sum() * theta_OI
        if np.isfinite(average_OI).all():  # otherwise NaN stays where it is
            average_OI += self._difference(theta_EOI, average_OI, weights_E, block.extras)
        merged = average_OI if self.input_axis == 1 else average_OI.T
        block.out_N[:] = merged.reshape(-1)

    def _difference(
        self, theta_EOI: np.ndarray, average_OI: np.ndarray, weights_E: np.ndarray, triangles: Sequence[np.ndarray]
    ) -> np.ndarray:
        """(sum_k w_k G_k)^-1 sum_k w_k G_k (W_k - average), as [O, I]."""
        inputs = average_OI.shape[1]
        gram_II, sum_II = np.empty((inputs, inputs)), np.zeros((inputs, inputs))
        target_IO = np.zeros(average_OI.T.shape)
        for weight, theta_OI, triangle_N in zip(weights_E, theta_EOI, triangles, strict=True):
            unpack(triangle_N, min(self.alpha, _ALPHA), gram_II)
            gram_II *= weight
            sum_II += gram_II
            target_IO += gram_II @ (theta_OI - average_OI).T
        del gram_II
        dead = np.flatnonzero(np.diagonal(sum_II) == 0)
        sum_II[dead, dead] = 1
        if (np.diagonal(sum_II) < 0).any():
            raise InputError(_NO_GRAM)
        try:
            solved_IO: np.ndarray = np.linalg.solve(sum_II, target_IO)
        except np.linalg.LinAlgError:
            raise InputError(_NO_GRAM) from None
        return solved_IO.T


class InputsFirst(RegMean):
    """RegMean of weights [I, O]."""

    input_axis: ClassVar[int] = 0


def triangle(size: int) -> int:
    """Number of entries on and above the diagonal of a matrix."""
    return size * (size + 1) // 2


@kernel
def unpack(triangle_N: np.ndarray, alpha: float, out_II: np.ndarray) -> None:
    """A symmetric matrix from its upper triangle, entries off the diagonal multiplied by `alpha`."""
    place = 0
    for row in range(len(out_II)):
        out_II[row, row] = triangle_N[place]
        for column in range(row + 1, len(out_II)):
            value = alpha * np.float64(triangle_N[place + column - row])
            out_II[row, column] = value
            out_II[column, row] = value
        place += len(out_II) - row
