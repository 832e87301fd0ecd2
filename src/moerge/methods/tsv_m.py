"""TSV-M."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from moerge.methods.spectral import SpectralMethod, isometries, multiplied, singular, spectral_bytes


class TsvM(SpectralMethod):
    """Task singular vectors, merged (Gargiulo et al. 2025, section 4.2, algorithm 1): theta = theta_base + scale * U S V^T.

    Of each w_k tau_k = U_k S_k V_k^T, the min(O, I) // E largest singular values stay. Their vectors are put side by side and
    made orthogonal: U and V are the matrices with orthonormal columns next to [U_1 ... U_K] and [V_1 ... V_K] (Procrustes). This
    is for tensors with two dimensions, embeddings and heads among them, as in the published code, which leaves out only
    CLIP's text_projection; the mean of the task vectors for all others, norms and biases. Singular values that are zero to
    float32, as most are of a LoRA, take no part, nor do directions in which the vectors of several experts coincide: published
    code completes both with arbitrary vectors. Its "lossless" variant keeps all singular values; ours keeps the paper's 1/E.

    Not for embeddings of large vocabularies, whose rows are no linear map of each other (override `embedding` and `head`), nor
    in a hurry: a decomposition takes in the order of 10 min(O, I)^2 (min(O, I) + max(O, I) / 5) operations for each expert.
    """

    name: ClassVar[str] = "tsv_m"

    def scratch_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Singular vectors of all experts, and one decomposition."""
        return spectral_bytes(shape, vectors=True)

    def combine_matrices(self, tau_EOI: np.ndarray, out_OI: np.ndarray) -> None:
        """U S V^T."""
        rank = max(1, min(out_OI.shape) // len(tau_EOI))
        left_OR, values_R, right_RI = isometries([singular(tau_OI, rank) for tau_OI in tau_EOI])
        multiplied(left_OR * values_R, right_RI, out_OI)
