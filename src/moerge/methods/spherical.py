"""Interpolation of directions and lengths. What these methods weigh vectors by follows from their inner products alone.

So one pass measures the products in float64, and merging is a weighted sum.
Shapes: E experts, N elements, G vectors that a tensor is cut into.
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
        """The inner products, float64 [E, E]."""
        upper_EE = (yield Statistic(partial(np.zeros, (experts, experts, LANES)), add_products)).sum(axis=2)
        return upper_EE + np.triu(upper_EE, 1).T

    def coefficients(self, products_EE: np.ndarray, weights_E: np.ndarray) -> np.ndarray:
        """c [E], from inner products and weights in float64."""
        raise NotImplementedError

    def combine(self, block: Block) -> None:
        """sum_k c_k (theta_k - origin)."""
        c_E = self.coefficients(block.statistic, block.weights_E.astype(np.float64))
        weighted_sum(block.theta_EN, c_E.astype(np.float32), np.float32(1), block.out_N)

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
        """The products [E, E] of a tensor, or of its vectors [3, G] with the length of a row."""
        if self.vectors == "tensor" or len(shape) < 2:
            return (yield from self.measure(experts, math.prod(shape)))
        by_row, size = self.vectors == "row", math.prod(shape)
        columns = shape[-1] if by_row else size // shape[0]
        count = size // columns if by_row else columns
        add = partial(_add_vectors, columns, by_row)
        products_3G = yield Statistic(partial(np.zeros, (3, count)), add, uses_start=True)
        return products_3G, columns

    def coefficients(self, products_EE: np.ndarray, weights_E: np.ndarray) -> np.ndarray:
        """Return the statistic of the tensor."""
        return _arc(products_EE[[0, 1, 0], [0, 1, 1]][:, None], weights_E)[:, 0]

    def combine(self, block: Block) -> None:
        """Each vector by its own angle."""
        if not isinstance(block.statistic, tuple):
            super().combine(block)
            return
        (products_3G, columns), weights_E = block.statistic, block.weights_E.astype(np.float64)
        if self.vectors == "column":
            _weigh_columns(block.theta_EN, _arc(products_3G, weights_E).astype(np.float32), block.start, block.out_N)
            return
        first, stop = block.start // columns, -(-(block.start + block.out_N.size) // columns)
        c_EG = _arc(products_3G[:, first:stop], weights_E).astype(np.float32)
        weigh_chunks(block.theta_EN, c_EG, columns, block.start - first * columns, block.out_N)


class MultiSlerp(_Spherical):
    """theta = origin + sum_k w_k |v_k| * m / |m|, m = sum_k w_k v_k / |v_k|, v_k = theta_k - origin; sum_k w_k = 1.

    The mean direction with the mean length, for any number of experts (mergekit, `multislerp`). mergekit also goes from m into
    its tangent space and back, but its tangent vectors v_k / |v_k| - <v_k / |v_k|, m> m have the weighted mean zero, so that
    nothing but rounding comes of it. Where directions cancel the result is linear; mergekit refuses more than two such experts.
    `normalize: false` takes the weights as they are.

    Not for task vectors of different tasks: near orthogonal ones are averaged and then stretched by about sqrt(E).
    """

    name: ClassVar[str] = "multislerp"
    normalize: bool = True

    @property
    def divides_by_weights(self) -> bool:
        """True with `normalize`."""
        return self.normalize

    def coefficients(self, products_EE: np.ndarray, weights_E: np.ndarray) -> np.ndarray:
        """c_k = w_k / |v_k| * (sum_j w_j |v_j|) / |m|."""
        weights_E = weights_E / weights_E.sum() if self.normalize else weights_E
        norms_E = np.sqrt(np.diagonal(products_EE))
        c_E = weights_E * _inverse(norms_E)
        length = _norm(c_E, products_EE)
        if length <= _NOTHING * np.abs(weights_E).sum():
            return weights_E
        scaled_E: np.ndarray = c_E * (weights_E @ norms_E / length)
        return scaled_E


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

    def coefficients(self, products_EE: np.ndarray, weights_E: np.ndarray) -> np.ndarray:
        """Return the weights of m, stretched to the mean length."""
        norms_E = np.sqrt(np.diagonal(products_EE))
        weights_E, inverse_E = weights_E / weights_E.sum(), _inverse(norms_E)
        cosines_EE = products_EE * np.outer(inverse_E, inverse_E)
        used_E = np.where(norms_E > 0, weights_E, 0.0)
        if abs(used_E.sum()) <= _NOTHING:
            return weights_E
        c_E: np.ndarray = weights_E @ norms_E * self._mean(cosines_EE, used_E / used_E.sum()) * inverse_E
        return c_E

    def _mean(self, cosines_EE: np.ndarray, weights_E: np.ndarray) -> np.ndarray:
        """The mean of unit vectors in terms of them."""
        length = _norm(weights_E, cosines_EE)
        mean_E = weights_E / length if length >= self.tol else np.eye(len(weights_E))[np.argmax(weights_E != 0)]
        for _ in range(self.max_iter):
            angles_E = np.arccos(np.clip(cosines_EE @ mean_E, -1, 1))
            sines_E = np.sin(angles_E)
            has_way_E = (angles_E >= self.tol) & (sines_E > _NOTHING)  # to what lies here there is none, to the opposite any
            stretch_E = weights_E * np.divide(angles_E, sines_E, out=np.zeros_like(angles_E), where=has_way_E)
            step_E = stretch_E - (stretch_E @ np.cos(angles_E)) * mean_E
            length = _norm(step_E, cosines_EE)
            if length < self.tol:
                break
            mean_E = math.cos(length) * mean_E + math.sin(length) / length * step_E
            mean_E = mean_E / _norm(mean_E, cosines_EE)
        return mean_E


def _norm(c_E: np.ndarray, products_EE: np.ndarray) -> float:
    """The length of sum_k c_k v_k."""
    return math.sqrt(max(0.0, float(c_E @ products_EE @ c_E)))


def _inverse(norms_E: np.ndarray) -> np.ndarray:
    inverse_E: np.ndarray = np.divide(1, norms_E, out=np.zeros_like(norms_E), where=norms_E > 0)
    return inverse_E


def _arc(products_3G: np.ndarray, weights_E: np.ndarray) -> np.ndarray:
    """NuSlerp's coefficients [2, G] from the squared lengths of two vectors and their product."""
    t = weights_E[1] / weights_E.sum()
    first_G, second_G, dot_G = products_3G
    norms_G = np.sqrt(first_G) * np.sqrt(second_G)
    cosine_G = np.clip(np.divide(dot_G, norms_G, out=np.ones_like(dot_G), where=norms_G > 0), -1, 1)
    angle_G, sine_G = np.arccos(cosine_G), np.sqrt(1 - cosine_G * cosine_G)
    on_arc_G = sine_G > _NOTHING
    c_2G: np.ndarray = np.repeat([[1 - t], [t]], len(dot_G), axis=1)
    np.divide(np.sin(np.outer([1 - t, t], angle_G)), sine_G, out=c_2G, where=on_arc_G)
    return c_2G


def _add_vectors(columns: int, by_row: bool, theta_EN: np.ndarray, total_3G: np.ndarray, start: int) -> None:
    _add_products(theta_EN, start, columns, by_row, total_3G)


@kernel
def _add_products(theta_EN: np.ndarray, start: int, columns: int, by_row: bool, total_3G: np.ndarray) -> None:
    size = theta_EN.shape[1]
    for row in range(start // columns, (start + size - 1) // columns + 1):
        before = row * columns - start
        for i in range(max(0, before), min(size, before + columns)):
            a, b = np.float64(theta_EN[0, i]), np.float64(theta_EN[1, i])
            vector = row if by_row else i - before
            total_3G[0, vector] += a * a
            total_3G[1, vector] += b * b
            total_3G[2, vector] += a * b


@kernel
def _weigh_columns(theta_EN: np.ndarray, c_EC: np.ndarray, start: int, out_N: np.ndarray) -> None:
    columns = c_EC.shape[1]
    for row in range(start // columns, (start + out_N.size - 1) // columns + 1):
        before = row * columns - start
        for i in range(max(0, before), min(out_N.size, before + columns)):
            out_N[i] = c_EC[0, i - before] * theta_EN[0, i] + c_EC[1, i - before] * theta_EN[1, i]
