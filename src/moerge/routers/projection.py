"""Gates from the experts' weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from moerge.errors import InputError
from moerge.operations.fitter import FitContext, MoESize
from moerge.routers.base import Temperature
from moerge.routers.calibrated import ModelRouter, gates_by_name
from moerge.routers.regression import normalize_gate
from moerge.tensors.linalg import leading_svd

if TYPE_CHECKING:
    from moerge.texts import TextRequest, Texts

SEQUENCES, TOKENS = 24, 128
"""How many random sequences are run, and of how many tokens."""
_FIRST = ("gate", "up", "gate_up", "shared.gate_up")
"""The matrices of a feed-forward module that read its input."""


class ProjectionRouter(ModelRouter):
    """Row i of a gate is the sum of s_k sigma_k v_k over the `rank` directions of input that expert i's training changed most.

    v_k and sigma_k are the leading right singular vectors and values of the expert's task vector in the layer's first FFN
    matrices (gate over up). Arrow (Ostapenko et al. 2024, rank 1) and SMILE (Tang et al. 2024, rank k) route by |V^T x|, which
    is not linear in x, while native gates are. Each direction therefore counts with one sign s_k, and inputs that lie on its
    other side, which |V^T x| would send to the expert as well, are kept away from it. What is lost is small if the sign is
    right, since an expert's own inputs mostly lie on one side, and everything if it is wrong. No weight tells the sign (v and
    -v give the same singular value), so it is guessed, without any text:

    - `sign: skew` (default) runs the merged model over random tokens. Few inputs go far along an expert's direction, and those
      that do are like its own text: the sign is that of the third moment of v x.
    - `sign: mean` runs nothing: the sign is that of v m, m being the mean of the base's normalized embeddings times the norm
      before this FFN, if there is one. It ignores all that lies before the layer, and hardly beats a coin.

    Rows get unit norm; logits are divided by `temperature`. The base's task vector is zero and so is its row. It is what can be
    done where no text is at hand: a few texts and `hidden` or `ridge` do better.
    """

    kind: ClassVar[str] = "projection"
    rank: Annotated[int, Field(ge=1)] = 1
    sign: Literal["skew", "mean"] = "skew"
    seed: int = 0
    temperature: Temperature = 1.0

    @property
    def runs_model(self) -> bool:
        """Only random tokens need the model."""
        return self.sign == "skew"

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """No text, but a base."""
        if not request.has_base:
            raise InputError(f"{request.source}: the projection router works on task vectors, so the recipe needs a 'base'")
        return ()

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """The merged model where it runs, else about three task vectors of one layer for each expert at work."""
        at_once = min(threads, size.experts)
        return super().memory_bytes(size, threads) if self.runs_model else 12 * at_once * size.module // size.layers

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """A few dozen products of task vectors with the leading directions, and the random tokens."""
        directions = 2 * 2 * 30 * (self.rank + 8) * size.experts * size.module * 2 / 3
        tokens = SEQUENCES * TOKENS if self.runs_model else 0
        return directions + 2.0 * tokens * (size.shared + size.experts * size.module)

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """Directions one layer of one expert at a time, then their signs."""
        hidden, layers = context.outputs[0].shape[1], range(len(context.outputs))
        if self.rank > hidden:
            raise InputError(f"moe.router.rank is {self.rank}, but the model is only {hidden} wide")
        with ThreadPoolExecutor(context.threads) as pool:
            scaled_LEHK = [list(pool.map(partial(self._directions, context, layer), context.experts)) for layer in layers]
        signs = self._skew_signs(context) if self.sign == "skew" else _mean_signs(context)

        def gate(layer: int) -> np.ndarray:
            rows = [(scaled_HK * signs(layer, scaled_HK)).sum(axis=1) for scaled_HK in scaled_LEHK[layer]]
            return normalize_gate(np.stack(rows), "columns", self.temperature)

        return gates_by_name(context, gate)

    def _directions(self, context: FitContext, layer: int, expert: str) -> np.ndarray:
        """sigma_k v_k as columns; zero where nothing was trained."""
        hidden = context.outputs[0].shape[1]
        if expert == "base":
            return np.zeros((hidden, 1), np.float32)
        block = context.outputs[layer].role.removesuffix(".router")
        roles = [role for part in _FIRST if context.has("base", role := f"{block}.ffn.{part}")]
        tau_RH = np.concatenate([_rows(context.read(expert, role) - context.read("base", role), hidden) for role in roles])
        if not tau_RH.any():
            return np.zeros((hidden, 1), np.float32)
        leading_HK, sigma_K = leading_directions(tau_RH, self.rank)
        scaled_HK: np.ndarray = leading_HK * sigma_K
        return scaled_HK

    def _skew_signs(self, context: FitContext) -> Callable[[int, np.ndarray], np.ndarray]:
        with self.replicas(context) as replicas:
            drawn = [replicas.model.random_tokens(self.seed + run, TOKENS) for run in range(SEQUENCES)]
            runs = [
                run for batch in replicas.run(lambda model, ids_1T: model.router_inputs(ids_1T, None), drawn) for run in batch
            ]
        states_LTH = [np.concatenate([run[layer].cpu().numpy() for run in runs]) for layer in range(len(context.outputs))]
        return lambda layer, scaled_HK: _signs((states_LTH[layer].astype(np.float64) @ scaled_HK) ** 3)


def _rows(tau: np.ndarray, hidden: int) -> np.ndarray:
    """The task vector [R, H] of a matrix; GPT-2 stores [H, R]."""
    return tau if tau.shape[1] == hidden else tau.T


def _mean_signs(context: FitContext) -> Callable[[int, np.ndarray], np.ndarray]:
    embedding_VH = context.read("base", "embedding").astype(np.float64)
    scale_V1 = np.sqrt(np.mean(embedding_VH**2, axis=1, keepdims=True))
    mean_H = (embedding_VH / np.maximum(scale_V1, 1e-12)).mean(axis=0)

    def signs(layer: int, scaled_HK: np.ndarray) -> np.ndarray:
        norm = f"{context.outputs[layer].role.removesuffix('.router')}.norm.ffn"
        typical_H = mean_H * context.read("base", norm) if context.has("base", norm) else mean_H
        return _signs((typical_H @ scaled_HK)[None])

    return signs


def _signs(values_TK: np.ndarray) -> np.ndarray:
    return np.where(values_TK.sum(axis=0) < 0, np.float32(-1), np.float32(1))


def leading_directions(matrix_RH: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `rank` right singular vectors as columns [H, K], up to their sign, and singular values."""
    _, sigma_K, leading_KH = leading_svd(matrix_RH, rank)
    return leading_KH.T, sigma_K
