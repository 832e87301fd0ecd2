"""Proj-in in closed form. Shapes: V tokens, M the shared width, D the expert's, N units, F features, R rows of a block."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np

from moerge.architecture.heterogeneous import EMBEDDING
from moerge.operations.fitter import FitContext
from moerge.projectors.fit import PENALTY, ProjectorFit, RowPairs, named
from moerge.projectors.least_squares import NormalEquations
from moerge.projectors.token_weights import TokenWeights
from moerge.projectors.units import TokenDetectors, token_detectors
from moerge.tensors.dtypes import DType
from moerge.tensors.tables import Table
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.rounded import rounded


class ProjectorInFit(ProjectorFit):
    """Proj-in: ridge regression of E_i - E P on [E, 1, gelu(up(E))], each token counting as `TokenWeights` says.

    E [V, M] is the shared embedding, E_i [V, D] the expert's, and P keeps the first D of M coordinates. Each unit of the MLP's
    first layer stands for one of the N tokens that count most (see `token_detectors`): so these come out nearly exact,
    and the linear part serves all others.
    """

    kind: ClassVar[str] = "projector_in"

    def __init__(self, expert: str, embedding: Tensor, weights: TokenWeights, *, shared: int, units: int, seed: int) -> None:
        super().__init__(expert, embedding, weights, shared + 1 + units)
        self.units, self.seed = units, seed

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the number of units, and the seed of those that stand for no token."""
        return {"units": self.units, "penalty": PENALTY, "seed": self.seed}

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """All six tensors."""
        pairs = self.pairs(context, EMBEDDING)
        weights_V = self.weights.of(context, self.expert, pairs.own.rows)
        mean_M, differ = pairs.mean(weights_V)
        first = context.outputs[0]
        units = self._units(pairs.shared, weights_V, mean_M, first.name.rsplit(".", 2)[0], first.dtype)
        linear_DM = np.eye(pairs.own.columns, pairs.shared.columns)
        bias_D, down_DN = np.zeros(pairs.own.columns), np.zeros((pairs.own.columns, self.units))
        if differ:
            solution_FD = self._solution(context, pairs, weights_V, units)
            width = pairs.shared.columns
            linear_DM += solution_FD[:width].T
            bias_D, down_DN = solution_FD[width], solution_FD[width + 1 :].T
        return named(context, linear=(linear_DM, bias_D), up=(units.up_NM, units.bias_N), down=(down_DN, np.zeros_like(bias_D)))

    def _units(self, shared: Table, weights_V: np.ndarray, mean_M: np.ndarray, name: str, dtype: DType) -> TokenDetectors:
        chosen_K = np.argsort(-weights_V, kind="stable")[: self.units]
        units = token_detectors(shared.take(chosen_K), mean_M, self.units, self.seed, f"{name}.up")
        return TokenDetectors(rounded(units.up_NM, dtype), rounded(units.bias_N, dtype))

    def _solution(self, context: FitContext, pairs: RowPairs, weights_V: np.ndarray, units: TokenDetectors) -> np.ndarray:
        with ThreadPoolExecutor(context.threads) as pool:
            equations = NormalEquations(self.features, pairs.own.columns, pool.map)
            for rows, shared_RM, residual_RD in pairs:
                constant_R1 = np.ones((len(shared_RM), 1))
                features_RF = np.concatenate([shared_RM, constant_R1, units.apply(shared_RM)], axis=1)
                equations.add(features_RF, residual_RD, weights_V[rows])
                context.advance(len(shared_RM))
        return equations.solve(PENALTY, free=pairs.shared.columns)
