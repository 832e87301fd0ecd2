"""Scores of experts from one table of sums, and who stays.

The table of a layer holds, for each expert, the sum over the tokens routed to it of gate^a * norm^b for a and b of 0, 1 and 2:
its gate as the model dispatches it, and the norm of its output. Shapes: L layers, C domains, E experts, D width; A and B are the
two axes of powers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

POWERS = 3
"""Powers of gates and norms in the table: 0, 1 and 2."""

_SUPER_PERCENTILE, _SUPER_SHARE, _SUPER_LAYERS = 99.5, 0.1, 0.75


class Score(NamedTuple):
    """The mean or sum over routed tokens of gate^`gate` * norm^`norm` (arXiv 2606.15716)."""

    mean: bool
    gate: int
    norm: int


SCORES = {
    "frequency": Score(False, 0, 0),
    "gate": Score(False, 1, 0),
    "ean": Score(False, 0, 1),
    "easy_ep": Score(False, 1, 1),
    "reap": Score(True, 1, 1),
    "man": Score(True, 0, 1),
    "msan": Score(True, 0, 2),
}
"""Published scores by name: EAN and REAP (arXiv 2510.13999), EASY-EP (arXiv 2504.06792), MAN and MSAN (arXiv 2606.15716)."""


def table_of(chosen_TK: np.ndarray, gates_TK: np.ndarray, norms_TK: np.ndarray, experts: int) -> np.ndarray:
    """The table of some tokens, float64 [E, A, B], from the experts that each goes to, their gates and the norms of outputs."""
    flat, gates_N, norms_N = (array.reshape(-1) for array in (chosen_TK, gates_TK, norms_TK))
    table_EAB = np.zeros((experts, POWERS, POWERS))
    for a in range(POWERS):
        for b in range(POWERS):
            weights_N = gates_N.astype(np.float64) ** a * norms_N.astype(np.float64) ** b
            table_EAB[:, a, b] = np.bincount(flat, weights_N, experts)
    return table_EAB


def scores_of(table_EAB: np.ndarray, score: Score) -> np.ndarray:
    """Each expert's score, [E]; 0 for one that no token goes to."""
    total_E, count_E = table_EAB[:, score.gate, score.norm], table_EAB[:, 0, 0]
    return _over(total_E, count_E) if score.mean else total_E.copy()


def mone_scores(table_EAB: np.ndarray, output_ED: np.ndarray) -> np.ndarray:
    """MoNE (arXiv 2507.00390): the norm of the outputs' standard deviation times the mean gate, over routed tokens, [E].

    `output_ED` is the sum of outputs over routed tokens.
    """
    count_E = table_EAB[:, 0, 0]
    mean_ED = output_ED / np.maximum(count_E, 1)[:, None]
    variance_E = _over(table_EAB[:, 0, 2], count_E) - (mean_ED**2).sum(axis=1)
    return np.asarray(np.sqrt(np.maximum(variance_E, 0)) * _over(table_EAB[:, 1, 0], count_E))


def _over(total_E: np.ndarray, count_E: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(total_E, count_E, out=np.zeros_like(total_E), where=count_E > 0))


def super_experts(peak_LE: np.ndarray) -> np.ndarray:
    """True for experts with massive activations, bool [L, E] (arXiv 2507.23279, with the limits of REAP's code).

    The largest output entry exceeds the 99.5th percentile over all experts and a tenth of the maximum, in the first three
    quarters of the layers.
    """
    limit = max(float(np.percentile(peak_LE, _SUPER_PERCENTILE)), _SUPER_SHARE * float(peak_LE.max(initial=0.0)))
    early_L1 = (np.arange(len(peak_LE)) < _SUPER_LAYERS * len(peak_LE))[:, None]
    return (peak_LE > limit) & early_L1


def order_of(scores_E: np.ndarray, protected_E: np.ndarray | None = None) -> np.ndarray:
    """The experts from best to worst, protected ones first; of equal ones the lower number first."""
    worst_first_E = -scores_E
    return np.lexsort((np.arange(len(scores_E)), worst_first_E, *([] if protected_E is None else [~protected_E])))


def keep(
    scores_CE: np.ndarray,
    pooled_E: np.ndarray,
    count: int,
    rule: Literal["pooled", "union"],
    protected_E: np.ndarray | None = None,
) -> tuple[int, ...]:
    """The numbers of `count` experts that stay, in ascending order.

    Args:
        scores_CE: Each domain's scores.
        pooled_E: Scores over the text of all domains.
        count: Experts that stay.
        rule: `pooled` takes the best of all text; `union` the best of each domain in turn, as far as all of them fit, and fills
            up with the best of all text (arXiv 2607.16721).
        protected_E: Experts that come before all others.

    Returns:
        Numbers of experts.
    """
    ranking = order_of(pooled_E, protected_E).tolist()
    chosen: list[int] = []
    if rule == "union":
        chosen = _union([order_of(scores_E, protected_E).tolist() for scores_E in scores_CE], count)
    return tuple(sorted([*chosen, *(expert for expert in ranking if expert not in chosen)][:count]))


def _union(rankings: Sequence[Sequence[int]], count: int) -> list[int]:
    """The union of the first experts of each ranking, as many of each as fit into `count` together."""
    chosen: dict[int, None] = {}
    for row in zip(*rankings, strict=True):
        wider = {**chosen, **dict.fromkeys(row)}
        if len(wider) > count:
            break
        chosen = wider
    return list(chosen)
