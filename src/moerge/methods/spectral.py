"""Singular values and vectors of matrices larger than a block, from the eigenvectors of the smaller Gram matrix.

Shapes: a matrix [O, I]; M is the smaller of its sides, N the larger, R singular values. Everything is computed in float64:
squares of a float32's 24 bits fit into its 53, so what a float32 decomposition would find is found, in a third of its time and
without a float64 copy of the matrix. Singular values below ZERO times the largest count as zero, and their vectors, which are
arbitrary, take no part in anything: methods that would mix them into a result are defined without them here.

BLAS and LAPACK run on one thread (see `planning.execute`), so results do not depend on the number of threads; their last bits
may depend on the kind of CPU, as no other method's do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from moerge.methods.formulas import weighted_sum
from moerge.methods.method import Block, Finite, TaskVectorMethod, Unit

ZERO = 1e-6
_CHUNK = 1 << 22
"""Elements that are converted to float64 at a time."""
_EIGH = 5
"""Matrices [M, M] that a decomposition holds: the Gram matrix, its copy, LAPACK's workspace of two, and the eigenvectors."""


Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Left singular vectors [O, R], singular values [R], right singular vectors [R, I], float64."""


class SpectralMethod(TaskVectorMethod):
    """theta = theta_base + scale * f(w_1 tau_1, ..., w_E tau_E), f a function of matrices; the mean for what is no matrix."""

    scale: Finite = 1.0

    @property
    def unit(self) -> Unit:
        """The whole tensor."""
        return "tensor"

    def scratch_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """One decomposition."""
        return spectral_bytes(shape, vectors=False)

    def combine_matrices(self, tau_EOI: np.ndarray, out_OI: np.ndarray) -> None:
        """Write f to `out_OI`; `tau_EOI`, already weighted, may be overwritten."""
        raise NotImplementedError

    def combine(self, block: Block) -> None:
        """f of matrices, the mean of all else."""
        if len(block.shape) != 2:
            weighted_sum(block.theta_EN, block.weights_E, np.float32(len(block.theta_EN)), block.out_N)
            return
        for tau_N, weight in zip(block.theta_EN, block.weights_E, strict=True):
            np.multiply(tau_N, weight, out=tau_N)
        if not np.isfinite(block.theta_EN).all() or not block.theta_EN.any():
            block.out_N[:] = block.theta_EN.sum(axis=0)  # NaN in all that a decomposition would spread it to, or zero
            return
        self.combine_matrices(block.theta_EN.reshape(-1, *block.shape), block.out_N.reshape(block.shape))


def spectral_bytes(shape: tuple[int, ...], *, vectors: bool, copies: int = 0) -> int:
    """Bytes that decomposing matrices of this shape takes, with `copies` of them in float64.

    `vectors` if up to M singular vectors of both sides are collected, put side by side and made orthogonal.
    """
    if len(shape) != 2:
        return 0
    small, large = min(shape), max(shape)
    kept = 2 * small * (small + large) if vectors else 0
    return 8 * (_EIGH * small * small + kept + min(small * large, 2 * _CHUNK) + copies * small * large)


def singular(matrix_OI: np.ndarray, rank: int) -> Triplets:
    """The `rank` largest singular values that are not zero, with their vectors."""
    if matrix_OI.shape[0] > matrix_OI.shape[1]:
        left_IR, values_R, right_RO = singular(matrix_OI.T, rank)
        return right_RO.T, values_R, left_IR.T
    values_M, vectors_MM = decomposed(matrix_OI)
    count = min(rank, int(np.count_nonzero(values_M)))
    left_MR = np.ascontiguousarray(vectors_MM[:, :count])
    right_RN = np.empty((count, matrix_OI.shape[1]))
    for part, piece_MC in _pieces(matrix_OI):
        np.matmul(left_MR.T, piece_MC, out=right_RN[:, part])
    right_RN /= values_M[:count, None]
    return left_MR, values_M[:count], right_RN


def decomposed(matrix_MN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All M singular values, falling, with those that count as zero set to zero, and the vectors of the smaller side [M, M]."""
    gram_MM = np.zeros((len(matrix_MN), len(matrix_MN)))
    for _, piece_MC in _pieces(matrix_MN):
        gram_MM += piece_MC @ piece_MC.T
    squares_M, vectors_MM = np.linalg.eigh(gram_MM)
    values_M = np.sqrt(np.maximum(squares_M[::-1], 0))
    values_M[values_M <= ZERO * values_M[0]] = 0
    return values_M, vectors_MM[:, ::-1]


def isometries(parts: Sequence[Triplets]) -> Triplets:
    """Triplets side by side, with vectors made orthonormal: the isometries next to them (Procrustes)."""
    left_OR = np.concatenate([left for left, _, _ in parts], axis=1)
    values_R = np.concatenate([values for _, values, _ in parts])
    right_RI = np.concatenate([right for _, _, right in parts])
    return left_OR @ _inverse_root(left_OR.T @ left_OR), values_R, _inverse_root(right_RI @ right_RI.T) @ right_RI


def _inverse_root(gram_RR: np.ndarray) -> np.ndarray:
    """The pseudo-inverse of a Gram matrix's square root."""
    squares_R, vectors_RR = np.linalg.eigh(gram_RR)
    used_R = squares_R > ZERO**2 * squares_R[-1]
    scaled_RR = vectors_RR[:, used_R] / np.sqrt(np.sqrt(squares_R[used_R]))
    root_RR: np.ndarray = scaled_RR @ scaled_RR.T
    return root_RR


def multiplied(left_MM: np.ndarray, matrix_MN: np.ndarray, out_MN: np.ndarray) -> None:
    """out = left @ matrix, rounded to float32."""
    for part, piece_MC in _pieces(matrix_MN):
        out_MN[:, part] = left_MM @ piece_MC


def _pieces(matrix_MN: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Columns of a matrix, as many at a time as make up a chunk, in float64."""
    columns = max(1, _CHUNK // len(matrix_MN))
    for start in range(0, matrix_MN.shape[1], columns):
        part = slice(start, min(start + columns, matrix_MN.shape[1]))
        yield part, matrix_MN[:, part].astype(np.float64)
