"""The experts that stay in each layer, and those that are folded into them, from sums over text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moerge.reduction.groups import (
    centred,
    group_weights,
    hierarchical_labels,
    kmeans_labels,
    ream_groups,
    ream_similarity,
    without_zeros,
)
from moerge.reduction.scores import SCORES, Score, keep, mone_scores, scores_of, super_experts
from moerge.reduction.settings import Reduction
from moerge.reduction.sums import Sums, pooled


@dataclass(frozen=True, eq=False)
class LayerChoice:
    """One layer's experts: those `kept`, in ascending order, the one that each joins, and its weight in that group.

    Without folding every expert that goes joins none and has the number -1. `gate_share` is the share of all gates, as
    dispatched, that went to experts that are gone.
    """

    layer: int
    kept: tuple[int, ...]
    centre_E: np.ndarray
    weight_E: np.ndarray
    scores_E: np.ndarray
    gate_share: float

    def members(self, expert: int) -> tuple[int, ...]:
        """A kept expert's group, itself first."""
        others = np.flatnonzero(self.centre_E == expert).tolist()
        return (expert, *(other for other in others if other != expert))

    def weights(self, expert: int) -> tuple[float, ...]:
        """The weights of its members."""
        return tuple(float(self.weight_E[member]) for member in self.members(expert))

    @property
    def gone(self) -> tuple[int, ...]:
        """The experts that the result lacks, folded or not."""
        return tuple(expert for expert in range(len(self.centre_E)) if expert not in self.kept)

    def to_json(self) -> dict[str, Any]:
        """Figures for the manifest and `--json`."""
        groups = {str(expert): list(self.members(expert)) for expert in self.kept if len(self.members(expert)) > 1}
        return {
            "layer": self.layer,
            "kept": list(self.kept),
            "groups": groups,
            "gate_share_gone": round(self.gate_share, 6),
            "scores": [float(f"{score:.6g}") for score in self.scores_E],
        }


@dataclass(frozen=True, eq=False)
class Choice:
    """The choice for all layers with experts, and what is worth knowing about them: (layer, expert) in pairs."""

    layers: tuple[LayerChoice, ...]
    never_routed: tuple[tuple[int, int], ...]
    protected: tuple[tuple[int, int], ...]


def choose(domains: Mapping[str, Sums], layers: Sequence[int], reduction: Reduction) -> Choice:
    """Choose the experts of each of the `layers` that the sums are of.

    Raises InputError where groups cannot hold what goes.
    """
    whole = pooled(domains.values())
    protected_LE = super_experts(whole["peak_LE"])
    if reduction.protect == "none":
        protected_LE = np.zeros_like(protected_LE)
    found = [
        _layer(place, layer, list(domains.values()), whole, protected_LE[place], reduction) for place, layer in enumerate(layers)
    ]
    idle = np.argwhere(whole["table_LEAB"][:, :, 0, 0] == 0)
    return Choice(
        tuple(found),
        tuple((layers[int(place)], int(expert)) for place, expert in idle),
        tuple((layers[int(place)], int(expert)) for place, expert in np.argwhere(protected_LE)),
    )


def _layer(
    place: int, layer: int, domains: Sequence[Sums], whole: Sums, protected_E: np.ndarray, reduction: Reduction
) -> LayerChoice:
    sign = -1 if reduction.inverse else 1
    scores_E = scores(whole, place, reduction)
    by_domain_CE = sign * np.stack([scores(sums, place, reduction) for sums in domains])
    kept = keep(by_domain_CE, sign * scores_E, reduction.experts, reduction.domains, protected_E)
    count_E = whole["table_LEAB"][place, :, 0, 0]
    centre_E, weight_E = np.full(len(scores_E), -1), np.ones(len(scores_E))
    centre_E[list(kept)] = kept
    if reduction.merge is not None:
        centre_E = _grouped(place, whole, kept, scores_E, protected_E, reduction)
        kept = tuple(np.unique(centre_E).tolist())
        values_E = without_zeros(scores_E) if reduction.groups == "ream" else count_E
        for expert in kept:
            members = np.flatnonzero(centre_E == expert)
            weight_E[members] = group_weights(values_E, members)
    gates_E = whole["table_LEAB"][place, :, 1, 0]
    gone = np.setdiff1d(np.arange(len(scores_E)), kept)
    return LayerChoice(layer, kept, centre_E, weight_E, scores_E, float(gates_E[gone].sum() / max(gates_E.sum(), 1e-300)))


def scores(sums: Sums, place: int, reduction: Reduction) -> np.ndarray:
    """The scores of the experts of one layer."""
    table_EAB, name = sums["table_LEAB"][place], reduction.score
    if name == "random":
        return np.random.default_rng([reduction.seed, place]).random(len(table_EAB))
    if name == "mone":
        return mone_scores(table_EAB, sums["output_LED"][place])
    return scores_of(table_EAB, name if isinstance(name, Score) else SCORES[name])


def _grouped(
    place: int, whole: Sums, kept: tuple[int, ...], scores_E: np.ndarray, protected_E: np.ndarray, reduction: Reduction
) -> np.ndarray:
    if reduction.groups == "ream":
        sampled = max(float(whole["sampled_L"][place]), 1.0)
        similarity_EE = ream_similarity(whole["cosine_LEE"][place] / sampled, whole["logits_LEE"][place])
        return ream_groups(
            similarity_EE, scores_E, kept, protected_E & np.isin(np.arange(len(scores_E)), kept), reduction.capacity
        )
    alone = np.flatnonzero(protected_E)[: reduction.experts - 1]
    others = np.setdiff1d(np.arange(len(scores_E)), alone)
    count = reduction.experts - len(alone)
    if reduction.groups == "hierarchical":
        labels = hierarchical_labels(whole["mean_LED"][place][others] / max(float(whole["sampled_L"][place]), 1.0), count)
    else:
        labels = kmeans_labels(whole["products_LEE"][place][np.ix_(others, others)], count, reduction.seed + place)
    centre_E = np.arange(len(scores_E))
    centre_E[others] = others[centred(labels, scores_E[others])]
    return centre_E
