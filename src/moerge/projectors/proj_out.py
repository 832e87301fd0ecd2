"""Proj-out in closed form, and searched for from there.

Shapes: V tokens, K of them, M the shared width, D the expert's, S states, R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moerge.architecture.heterogeneous import HEAD, HEAD_BIAS
from moerge.checkpoint.reader import open_folder
from moerge.operations.fitter import FitContext
from moerge.projectors.divergence import INNER, STEPS, HeadMatching, least_divergence
from moerge.projectors.fit import PENALTY, ROWS, ProjectorFit, RowPairs, named
from moerge.projectors.least_squares import Map, NormalEquations
from moerge.projectors.states import STATES, expert_states
from moerge.projectors.token_weights import TokenWeights
from moerge.tensors.linalg import log_softmax
from moerge.tensors.tables import Table, blocks
from moerge.tensors.tensor import Tensor
from moerge.texts import Texts

if TYPE_CHECKING:
    from moerge.operations.fitter import MoESize

HELD_OUT = 5
"""Every so many-th text says when the search has gone far enough."""
COVERED, MOST_TOKENS = 0.999, 16384
"""How much of the probability the tokens have together over which divergence is computed, and how many these are at most."""


class ProjectorOutFit(ProjectorFit):
    """Proj-out: a linear map W such that the shared head says of W h what the expert's own head says of h, for states h.

    Without text, W minimises sum_v w_v ((H W h)_v - (H_i h)_v - c(h))^2, H [V, M] being the shared head and H_i [V, D] the
    expert's. c(h) is free, since softmax ignores what all logits share: W is the regression of H_i on [H, 1] without its
    intercept. What is squared is linear in h, and one W minimises it for every h: it does not matter which states it is summed
    over, as long as they span the space, and none are needed. The w_v are the tokens' weights (see `TokenWeights`). To second
    order the divergence between two softmaxes is half the squared difference of their logits, centred and weighted with the
    tokens' probabilities, and w are these on average; nothing nonlinear in h does better by this measure, so the MLP puts out
    zero until it is trained.

    With text, that is where the search starts: probabilities differ from state to state, and so does which differences of logits
    matter. W, and a bias, then make the mean divergence least over states of the expert on the text (see `least_divergence`),
    from its own predictions to those through the shared head. A fifth of the texts says when to stop. Only tokens that are
    predicted at all count, up to COVERED of the probability.

    Both leave the identity alone where the heads are equal.
    """

    kind: ClassVar[str] = "projector_out"

    def __init__(self, expert: str, head: Tensor, weights: TokenWeights, *, shared: int, bias: Tensor | None) -> None:
        super().__init__(expert, head, weights, shared + 1)
        self.bias = bias

    @property
    def settings(self) -> Mapping[str, Any]:
        """Nothing is drawn."""
        return {"penalty": PENALTY}

    @property
    def runs_model(self) -> bool:
        """Return whether there is text, on which the expert runs inside the merged model."""
        return self.weights.have_text

    @property
    def runs_one_expert(self) -> bool:
        """The expert whose states they are."""
        return True

    def steps(self, calibration: Sequence[Texts]) -> int:
        """Besides, with text, as many states as a search of all its steps sees."""
        return super().steps(calibration) + (STATES * STEPS if self.runs_model else 0)

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """Besides, with text, the expert, and probabilities of the states before and after."""
        tokens = min(MOST_TOKENS, self.table.shape[0])
        running = size.nbytes + 4 * STATES * 4 * tokens if self.runs_model else 0
        return super().memory_bytes(size, threads) + running

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Besides, with text, the expert over the states, and products of states and heads."""
        tokens, width = min(MOST_TOKENS, self.table.shape[0]), sum(self.table.shape[1:]) + self.features
        searching = 2.0 * STATES * tokens * width * STEPS * (INNER + 4)
        running = 2.0 * STATES * size.nbytes / 2 + 2.0 * STATES * self.table.size
        return super().operations(size, calibration) + (searching + running if self.runs_model else 0.0)

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """The linear part."""
        pairs = self.pairs(context, HEAD)
        weights_V = self.weights.of(context, self.expert, pairs.own.rows)
        own_V, shared_V = self._biases(context, pairs.own.rows)
        differ = (own_V != shared_V).any() or any(residual_RD.any() for _, _, residual_RD in pairs)
        linear_MD, bias_M = np.eye(pairs.shared.columns, pairs.own.columns), np.zeros(pairs.shared.columns)
        if differ:
            with ThreadPoolExecutor(context.threads) as pool:
                equations = NormalEquations(self.features, pairs.own.columns + 1, pool.map)
                for rows, shared_RM, residual_RD in pairs:
                    targets_RK = np.concatenate([residual_RD, (own_V - shared_V)[rows, None]], axis=1)
                    equations.add(_with_ones(shared_RM), targets_RK, weights_V[rows])
                    context.advance(len(shared_RM))
                solution_MK = equations.solve(PENALTY, free=pairs.shared.columns)[:-1]
                linear_MD, bias_M = linear_MD + solution_MK[:, :-1], solution_MK[:, -1]
                if self.runs_model:
                    both_MD = np.concatenate([linear_MD, bias_M[:, None]], axis=1)
                    both_MD = self._searched(context, pairs, both_MD, equations.covariance(), (own_V, shared_V), pool.map)
                    linear_MD, bias_M = both_MD[:, :-1], both_MD[:, -1]
        return named(context, linear=(linear_MD, bias_M))

    def _biases(self, context: FitContext, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the biases of the expert's head and of the shared one, zero where there is none."""
        shared = open_folder(context.folder, name="merged").tensors.get(HEAD_BIAS)
        own_V = np.zeros(rows) if self.bias is None else _vector(self.bias, self.expert)
        return own_V, np.zeros(rows) if shared is None else _vector(shared, "merged")

    def _searched(
        self,
        context: FitContext,
        pairs: RowPairs,
        start_MD: np.ndarray,
        moment_MM: np.ndarray,
        biases: tuple[np.ndarray, np.ndarray],
        map_panels: Map,
    ) -> np.ndarray:
        state_SD, text_S = expert_states(context, self.expert, pairs.own.rows)
        chosen_K, log_p_SK = predicted(pairs.own, state_SD, biases[0])
        shared_KM = pairs.shared.take(chosen_K)
        bias_K = biases[1][chosen_K].astype(np.float32)
        held_S = held_out(text_S)
        if held_S.all():  # too little text to say when to stop
            return start_MD
        parts = [HeadMatching(shared_KM, bias_K, _with_ones(state_SD[s]), log_p_SK[s], map_panels) for s in (~held_S, held_S)]
        return least_divergence(parts[0], parts[1], start_MD, moment_MM, lambda: context.advance(STATES))


def held_out(text_S: np.ndarray) -> np.ndarray:
    """Return a mask of the states of every fifth text; of fewer texts, of the last fifth of the states."""
    held_S: np.ndarray = text_S % HELD_OUT == HELD_OUT - 1
    if held_S.all() or not held_S.any():
        held_S = np.arange(len(text_S)) >= len(text_S) * (HELD_OUT - 1) // HELD_OUT
    return held_S


def predicted(head: Table, state_SD: np.ndarray, bias_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that a head predicts on these states, in order, and log of their probabilities among each other, float32 [S, K].

    They are the fewest whose mean probabilities add up to COVERED, and at most MOST_TOKENS. Two passes over the head, block by
    block: the first for what all logits of a state add up to, so that no more than a block of them is held.
    """
    most_S, total_S = np.full(len(state_SD), -np.inf, np.float32), np.zeros(len(state_SD))
    for _, logit_SR in _logits(head, state_SD, bias_V):
        before_S, most_S = most_S, np.maximum(most_S, logit_SR.max(axis=1))
        total_S = total_S * np.exp(before_S - most_S) + np.exp(logit_SR - most_S[:, None]).sum(axis=1)
    mean_V = np.empty(head.rows)
    for rows, logit_SR in _logits(head, state_SD, bias_V):
        mean_V[rows] = (np.exp(logit_SR - most_S[:, None]) / total_S[:, None]).mean(axis=0)
    order_V = np.argsort(-mean_V, kind="stable")
    count = int(np.searchsorted(np.cumsum(mean_V[order_V]), COVERED)) + 1
    chosen_K = np.sort(order_V[: min(count, MOST_TOKENS)])
    return chosen_K, log_softmax(state_SD @ head.take(chosen_K).T + bias_V[chosen_K].astype(np.float32))


def _logits(head: Table, state_SD: np.ndarray, bias_V: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some tokens, and their logits [S, R]."""
    for start, stop in blocks(head.rows, ROWS):
        yield slice(start, stop), state_SD @ head.read(start, stop).T + bias_V[start:stop].astype(np.float32)


def _with_ones(rows_RM: np.ndarray) -> np.ndarray:
    return np.concatenate([rows_RM, np.ones((len(rows_RM), 1), rows_RM.dtype)], axis=1)


def _vector(tensor: Tensor, owner: str) -> np.ndarray:
    values_V: np.ndarray = Table(tensor, owner).read(0, 1)[0].astype(np.float64)
    return values_V
