"""The first layer of a fitted MLP: units that tell single tokens from all others.

Shapes: K tokens, M columns, N units, R rows of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moerge.tensors.kernels import kernel
from moerge.tensors.random import stream_key, uniform

PRE_ACTIVATION = 2.0
"""What goes into a unit's gelu at its own token; at the mean token it is -PRE_ACTIVATION, where gelu has nearly come to rest."""


@dataclass(frozen=True)
class TokenDetectors:
    """gelu(up x + bias) of N units: `up_NM` and `bias_N`, float32."""

    up_NM: np.ndarray
    bias_N: np.ndarray

    def apply(self, rows_RM: np.ndarray) -> np.ndarray:
        """Return the units' values for some rows, float64 [R, N]."""
        value_RN: np.ndarray = rows_RM.astype(np.float64) @ self.up_NM.T.astype(np.float64) + self.bias_N
        _gelu(value_RN.reshape(-1))
        return value_RN


def token_detectors(tokens_KM: np.ndarray, mean_M: np.ndarray, units: int, seed: int, name: str) -> TokenDetectors:
    """A unit for each of K token embeddings: up = 2 h a / |a|^2, a being the embedding less the mean, and a bias.

    So h goes into the gelu at the token itself, -h at the mean, and in between according to how far another embedding lies in the
    token's direction: in many dimensions hardly any other token's lies half as far. Units beyond K, and those of tokens that
    lie at the mean, are drawn as torch.nn.Linear draws them, from the seed and the projector's name.
    """
    columns = tokens_KM.shape[1]
    bound = 1 / math.sqrt(columns)
    drawn_NM = (uniform(stream_key(seed, f"{name}.weight"), 0, units * columns).reshape(units, columns) * bound).astype(
        np.float32
    )
    drawn_N = (uniform(stream_key(seed, f"{name}.bias"), 0, units) * bound).astype(np.float32)
    apart_KM = tokens_KM - mean_M
    square_K = np.einsum("km,km->k", apart_KM, apart_KM)
    known = np.flatnonzero(square_K > 0)
    up_KM = 2 * PRE_ACTIVATION * apart_KM[known] / square_K[known, None]
    drawn_NM[known] = up_KM
    drawn_N[known] = -PRE_ACTIVATION - up_KM @ mean_M
    return TokenDetectors(drawn_NM, drawn_N)


@kernel
def _gelu(value_N: np.ndarray) -> None:
    for i in range(value_N.size):
        value_N[i] = 0.5 * value_N[i] * (1.0 + math.erf(value_N[i] / math.sqrt(2.0)))
