"""Isotropic merging. Shapes: E task vectors [O, I], M the smaller of O and I, R singular vectors."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.formulas import weighted_sum
from moerge.methods.spectral import SpectralMethod, decomposed, isometries, multiplied, singular, spectral_bytes
from moerge.methods.values import Proportion


class IsoC(SpectralMethod):
    """Isotropic merging in the common space (Marczak et al. 2025, section 4.1): theta = theta_base + scale * mean(S) U V^T.

    sum_k w_k tau_k = U S V^T; all its singular values become their mean. This is for tensors with two dimensions, embeddings
    and heads among them, as in the published code, which leaves out only CLIP's text_projection; the mean of the task vectors
    for all others, norms and biases. Singular values that are zero to float32 stay zero (published code gives the mean to
    arbitrary vectors instead); they count in the mean. The paper tunes the scale on held-out data; 1 is a start.

    Not for LoRAs or a single expert: where few directions matter, most of what is added is amplified noise. Not for embeddings
    of large vocabularies (override `embedding` and `head`).
    """

    name: ClassVar[str] = "iso_c"

    def combine_matrices(self, tau_EOI: np.ndarray, out_OI: np.ndarray) -> None:
        """mean(S) U V^T."""
        sum_OI = _sum(tau_EOI, out_OI)
        sum_MN, out_MN = (sum_OI, out_OI) if sum_OI.shape[0] <= sum_OI.shape[1] else (sum_OI.T, out_OI.T)
        values_M, vectors_MM = decomposed(sum_MN)
        used_M = values_M > 0
        flattened_MM = vectors_MM[:, used_M] * (values_M.mean() / values_M[used_M]) @ vectors_MM[:, used_M].T
        multiplied(flattened_MM, sum_MN, out_MN)


class IsoCts(SpectralMethod):
    """Isotropic merging in common and task-specific subspaces (Marczak et al. 2025, section 4.2, algorithm 2).

    As `iso_c`, but U and V hold the first singular vectors of sum_k w_k tau_k, `common_space_fraction` of all, and as many of
    each task vector's part outside of them as make up the rest; together they are made orthogonal (Procrustes). S holds all
    their singular values. The number of common vectors is rounded so that each expert gets as many.

    Not where `iso_c` is not; for experts that have much in common, hardly different from it and E + 2 times as slow.
    """

    name: ClassVar[str] = "iso_cts"
    common_space_fraction: Proportion = 0.8

    def scratch_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Singular vectors, one decomposition, and what is left of a task vector."""
        return spectral_bytes(shape, vectors=True, copies=2)

    def combine_matrices(self, tau_EOI: np.ndarray, out_OI: np.ndarray) -> None:
        """mean(S) U V^T."""
        experts, smaller = len(tau_EOI), min(out_OI.shape)
        each = round((smaller - int(smaller * self.common_space_fraction)) / experts)
        # the sum takes the place of the result, and the first task vector is still needed
        weighted_sum(tau_EOI.reshape(experts, -1), np.ones(experts, np.float32), np.float32(1), out_OI.reshape(-1))
        parts = [singular(out_OI, smaller - experts * each)]
        common_OR = parts[0][0]
        for tau_OI in tau_EOI if each else ():
            tau_OI -= (common_OR @ (common_OR.T @ tau_OI)).astype(np.float32)
            parts.append(singular(tau_OI, each))
        left_OR, values_R, right_RI = isometries(parts)
        multiplied(left_OR * (values_R.sum() / smaller), right_RI, out_OI)


def _sum(tau_EOI: np.ndarray, out_OI: np.ndarray) -> np.ndarray:
    """The sum of task vectors, in the first one's memory."""
    ones_E = np.ones(len(tau_EOI), np.float32)
    weighted_sum(tau_EOI.reshape(len(tau_EOI), -1), ones_E, np.float32(1), out_OI.reshape(-1))
    tau_EOI[0] = out_OI
    summed_OI: np.ndarray = tau_EOI[0]
    return summed_OI
