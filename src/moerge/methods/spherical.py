"""Interpolation of directions and lengths. What these methods weigh vectors by follows from their inner products alone.

So one pass measures the products in float64, and merging is a weighted sum.
Shapes: K experts, N elements, G vectors that a tensor is cut into.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moerge.methods.formulas import weigh_chunks, weighted_sum
from moerge.methods.method import Block, Measurement, MergeMethod, Statistic
from moerge.methods.products import LANES, add_products
from moerge.tensors.kernels import kernel

_NOTHING = 1e-6
"""Of a sum of directions or of a sine: below it, directions cancel or lie on a line, and what is left of them is rounding."""


class _Spherical(MergeMethod):
    """theta = origin + sum_k c_k (theta_k - origin), c from the inner products of the theta_k - origin.

    `origin: base` interpolates task vectors, `zero` the weights themselves, which needs no base.
    """

    or_without_base: ClassVar[str] = ", or 'origin: zero'"
    origin: Literal["base", "zero"] = "base"

    @property
    def uses_task_vectors(self) -> bool:  # type: ignore[override]  # of other methods this is a constant
        """True with `origin: base`."""
        return self.origin == "base"

    @property
    def measures(self) -> int:
        """One pass."""
        return 1

    def measure(self, experts: int, size: int) -> Measurement:
        """The inner products, float64 [K, K]."""
        upper_KK = (yield Statistic(partial(np.zeros, (experts, experts, LANES)), add_products)).sum(axis=2)
        return upper_KK + np.triu(upper_KK, 1).T

    def coefficients(self, products_KK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """c [K], from inner products and weights in float64."""
        raise NotImplementedError

    def combine(self, block: Block) -> None:
        """sum_k c_k (theta_k - origin)."""
        c_K = self.coefficients(block.statistic, block.weights_K.astype(np.float64))
        weighted_sum(block.theta_KN, c_K.astype(np.float32), np.float32(1), block.out_N)

    def merge(self, block: Block) -> None:
        """The sum, from the origin on."""
        self.combine(block)
        if self.uses_task_vectors:
            np.add(block.base_N, block.out_N, out=block.out_N)


class NuSlerp(_Spherical):
    """theta = origin + sin((1 - t) phi) / sin(phi) * v_1 + sin(t phi) / sin(phi) * v_2, v_k = theta_k - origin.

    phi is the angle between v_1 and v_2 and t = w_2 / (w_1 + w_2) (mergekit): Slerp of exactly two experts with weights for a
    position, of task vectors unless `origin: zero`. `vectors` says what has an angle of its own: the tensor, or each of its
    rows or columns (all elements that share their last indices). Where a vector is zero, or the two lie on one line, it
    interpolates linearly; mergekit takes a zero vector to be orthogonal to the other.

    Not for task vectors of different tasks, which are near orthogonal: it adds them up nearly unshortened.
    """

    name: ClassVar[str] = "nuslerp"
    exact_experts: ClassVar[int | None] = 2
    vectors: Literal["tensor", "row", "column"] = "tensor"

    @property
    def divides_by_weights(self) -> bool:
        """Always."""
        return True

    def measure_tensor(self, experts: int, shape: tuple[int, ...]) -> Measurement:
        """The products [K, K] of a tensor, or of its vectors [3, G] with the length of a row."""
        if self.vectors == "tensor" or len(shape) < 2:
            return (yield from self.measure(experts, math.prod(shape)))
        by_row, size = self.vectors == "row", math.prod(shape)
        columns = shape[-1] if by_row else size // shape[0]
        count = size // columns if by_row else columns
        add = partial(_add_vectors, columns, by_row)
        products_3G = yield Statistic(partial(np.zeros, (3, count)), add, uses_start=True)
        return products_3G, columns

    def coefficients(self, products_KK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """Return the statistic of the tensor."""
        return _arc(products_KK[[0, 1, 0], [0, 1, 1]][:, None], weights_K)[:, 0]

    def combine(self, block: Block) -> None:
        """Each vector by its own angle."""
        if not isinstance(block.statistic, tuple):
            super().combine(block)
            return
        (products_3G, columns), weights_K = block.statistic, block.weights_K.astype(np.float64)
        if self.vectors == "column":
            _weigh_columns(block.theta_KN, _arc(products_3G, weights_K).astype(np.float32), block.start, block.out_N)
            return
        first, stop = block.start // columns, -(-(block.start + block.out_N.size) // columns)
        c_KG = _arc(products_3G[:, first:stop], weights_K).astype(np.float32)
        weigh_chunks(block.theta_KN, c_KG, columns, block.start - first * columns, block.out_N)


class MultiSlerp(_Spherical):
    """theta = origin + sum_k w_k |v_k| * m / |m|, m = sum_k w_k v_k / |v_k|, v_k = theta_k - origin; sum_k w_k = 1.

    The mean direction with the mean length, for any number of experts (mergekit, `multislerp`). mergekit also goes from m into
    its tangent space and back, but its tangent vectors v_k / |v_k| - <v_k / |v_k|, m> m have the weighted mean zero, so that
    nothing but rounding comes of it. Where directions cancel the result is linear; mergekit refuses more than two such experts.
    `normalize: false` takes the weights as they are.

    Not for task vectors of different tasks: near orthogonal ones are averaged and then stretched by about sqrt(K).
    """

    name: ClassVar[str] = "multislerp"
    normalize: bool = True

    @property
    def divides_by_weights(self) -> bool:
        """True with `normalize`."""
        return self.normalize

    def coefficients(self, products_KK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """c_k = w_k / |v_k| * (sum_j w_j |v_j|) / |m|."""
        weights_K = weights_K / weights_K.sum() if self.normalize else weights_K
        norms_K = np.sqrt(np.diagonal(products_KK))
        c_K = weights_K * _inverse(norms_K)
        length = _norm(c_K, products_KK)
        if length <= _NOTHING * np.abs(weights_K).sum():
            return weights_K
        scaled_K: np.ndarray = c_K * (weights_K @ norms_K / length)
        return scaled_K


class Karcher(_Spherical):
    """theta = origin + sum_k w_k |v_k| * m, m = argmin over |m| = 1 of sum_k w_k angle(m, v_k)^2, v_k = theta_k - origin.

    The Karcher mean of the directions (Karcher 1977; for merging arXiv 2603.04972 and mergekit), found by gradient steps
    m <- exp_m(sum_k w_k log_m(v_k / |v_k|)) from the normalized mean on, at most `max_iter` and until one is shorter than `tol`.
    mergekit has no weights, works on the weights of models alone, and also leaves out vectors shorter than `tol`, not only
    zero ones.

    Not for experts of one ancestor with `origin: zero`: their angles are so small that it is the average.
    """

    name: ClassVar[str] = "karcher"
    origin: Literal["base", "zero"] = "zero"
    max_iter: Annotated[int, Field(ge=0, le=1000, strict=True)] = 10
    tol: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 1e-5

    @property
    def divides_by_weights(self) -> bool:
        """Always."""
        return True

    def coefficients(self, products_KK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """Return the weights of m, stretched to the mean length."""
        norms_K = np.sqrt(np.diagonal(products_KK))
        weights_K, inverse_K = weights_K / weights_K.sum(), _inverse(norms_K)
        cosines_KK = products_KK * np.outer(inverse_K, inverse_K)
        used_K = np.where(norms_K > 0, weights_K, 0.0)
        if abs(used_K.sum()) <= _NOTHING:
            return weights_K
        c_K: np.ndarray = weights_K @ norms_K * self._mean(cosines_KK, used_K / used_K.sum()) * inverse_K
        return c_K

    def _mean(self, cosines_KK: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
        """The mean of unit vectors in terms of them."""
        length = _norm(weights_K, cosines_KK)
        mean_K = weights_K / length if length >= self.tol else np.eye(len(weights_K))[np.argmax(weights_K != 0)]
        for _ in range(self.max_iter):
            angles_K = np.arccos(np.clip(cosines_KK @ mean_K, -1, 1))
            sines_K = np.sin(angles_K)
            has_way_K = (angles_K >= self.tol) & (sines_K > _NOTHING)  # to what lies here there is none, to the opposite any
            stretch_K = weights_K * np.divide(angles_K, sines_K, out=np.zeros_like(angles_K), where=has_way_K)
            step_K = stretch_K - (stretch_K @ np.cos(angles_K)) * mean_K
            length = _norm(step_K, cosines_KK)
            if length < self.tol:
                break
            mean_K = math.cos(length) * mean_K + math.sin(length) / length * step_K
            mean_K = mean_K / _norm(mean_K, cosines_KK)
        return mean_K


def _norm(c_K: np.ndarray, products_KK: np.ndarray) -> float:
    """The length of sum_k c_k v_k."""
    return math.sqrt(max(0.0, float(c_K @ products_KK @ c_K)))


def _inverse(norms_K: np.ndarray) -> np.ndarray:
    inverse_K: np.ndarray = np.divide(1, norms_K, out=np.zeros_like(norms_K), where=norms_K > 0)
    return inverse_K


def _arc(products_3G: np.ndarray, weights_K: np.ndarray) -> np.ndarray:
    """NuSlerp's coefficients [2, G] from the squared lengths of two vectors and their product."""
    t = weights_K[1] / weights_K.sum()
    first_G, second_G, dot_G = products_3G
    norms_G = np.sqrt(first_G) * np.sqrt(second_G)
    cosine_G = np.clip(np.divide(dot_G, norms_G, out=np.ones_like(dot_G), where=norms_G > 0), -1, 1)
    angle_G, sine_G = np.arccos(cosine_G), np.sqrt(1 - cosine_G * cosine_G)
    on_arc_G = sine_G > _NOTHING
    c_2G: np.ndarray = np.repeat([[1 - t], [t]], len(dot_G), axis=1)
    np.divide(np.sin(np.outer([1 - t, t], angle_G)), sine_G, out=c_2G, where=on_arc_G)
    return c_2G


def _add_vectors(columns: int, by_row: bool, theta_KN: np.ndarray, total_3G: np.ndarray, start: int) -> None:
    _add_products(theta_KN, start, columns, by_row, total_3G)


@kernel
def _add_products(theta_KN: np.ndarray, start: int, columns: int, by_row: bool, total_3G: np.ndarray) -> None:
    size = theta_KN.shape[1]
    for row in range(start // columns, (start + size - 1) // columns + 1):
        before = row * columns - start
        for i in range(max(0, before), min(size, before + columns)):
            a, b = np.float64(theta_KN[0, i]), np.float64(theta_KN[1, i])
            vector = row if by_row else i - before
            total_3G[0, vector] += a * a
            total_3G[1, vector] += b * b
            total_3G[2, vector] += a * b


@kernel
def _weigh_columns(theta_KN: np.ndarray, c_KC: np.ndarray, start: int, out_N: np.ndarray) -> None:
    columns = c_KC.shape[1]
    for row in range(start // columns, (start + out_N.size - 1) // columns + 1):
        before = row * columns - start
        for i in range(max(0, before), min(out_N.size, before + columns)):
            out_N[i] = c_KC[0, i - before] * theta_KN[0, i] + c_KC[1, i - before] * theta_KN[1, i]
