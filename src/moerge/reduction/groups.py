"""Groups of experts that are folded into one: REAM, HC-SMoE, and the k-means of Sub-MoE.

A grouping is an array [E] of the expert that each joins: one that stays joins itself. Shapes: E experts, D width.
"""

from __future__ import annotations

import numpy as np

from moerge.errors import InputError

CAPACITY = 16
"""Most experts in a group of REAM, as in its code."""

_RESTARTS, _MOST_STEPS = 10, 100


def ream_similarity(cosine_EE: np.ndarray, logits_EE: np.ndarray) -> np.ndarray:
    """Similarities of experts, [E, E], from outputs and router logits (REAM, arXiv 2604.04356, equations 5 to 8).

    Args:
        cosine_EE: Mean over tokens of the cosine of two experts' outputs; gates do not change it.
        logits_EE: Sum over tokens of the products of two router logits.

    Returns:
        The mean of the cosine, mapped to [0, 1], and of 1 - d / max d with d the distance of logits over tokens at length 1.
    """
    length_E = np.sqrt(np.maximum(np.diag(logits_EE), np.finfo(float).tiny))
    distance_EE = np.sqrt(np.maximum(2 - 2 * logits_EE / np.outer(length_E, length_E), 0))
    np.fill_diagonal(distance_EE, 0)
    largest = distance_EE.max(initial=0.0)
    near_EE = 1 - distance_EE / largest if largest > 0 else np.ones_like(distance_EE)
    return np.asarray(((1 + cosine_EE) / 2 + near_EE) / 2)


def ream_groups(
    similarity_EE: np.ndarray, scores_E: np.ndarray, kept: tuple[int, ...], protected_E: np.ndarray, capacity: int = CAPACITY
) -> np.ndarray:
    """Let kept experts, from the best score on, each take up to `capacity` - 1 of the most similar others (REAM).

    So the best few absorb everything, and most groups stay single. A protected expert takes none. Raises InputError where the
    others do not fit into the groups.
    """
    open_ones = [expert for expert in kept if not protected_E[expert]]
    left = [expert for expert in range(len(scores_E)) if expert not in kept]
    if len(left) > len(open_ones) * (capacity - 1):
        raise InputError(
            f"reduce.capacity: {len(open_ones)} groups of at most {capacity} experts have no room for {len(left)} more: raise it"
        )
    centre_E = np.arange(len(scores_E))
    for centre in sorted(open_ones, key=lambda expert: (-scores_E[expert], expert)):
        nearest = sorted(left, key=lambda expert: (-similarity_EE[centre, expert], expert))[: capacity - 1]
        centre_E[nearest] = centre
        left = [expert for expert in left if expert not in nearest]
    return centre_E


def hierarchical_labels(mean_ED: np.ndarray, count: int) -> np.ndarray:
    """Clusters of experts by average linkage of the distances of mean outputs (HC-SMoE, arXiv 2410.08589), [E].

    The mean is over all tokens, not only over those that are routed to an expert.
    """
    from scipy.cluster.hierarchy import linkage

    experts = len(mean_ED)
    labels_E = np.arange(experts)
    if count >= experts:
        return labels_E
    members = {expert: [expert] for expert in range(experts)}
    for step, (first, second, *_) in enumerate(linkage(mean_ED, "average")[: experts - count]):
        members[experts + step] = members.pop(int(first)) + members.pop(int(second))
    for label, group in enumerate(members.values()):
        labels_E[group] = label
    return labels_E


def kmeans_labels(products_EE: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Clusters of experts by k-means of their outputs on all tokens (Sub-MoE, arXiv 2506.23266), [E].

    `products_EE` are the inner products of outputs, which are all that Lloyd's iteration and k-means++ need. The best of ten
    starts counts. No cluster is empty.
    """
    experts = len(products_EE)
    if count >= experts:
        return np.arange(experts)
    generator = np.random.default_rng(seed)
    square_E = np.diag(products_EE)
    distance_EE = np.maximum(square_E[:, None] + square_E - 2 * products_EE, 0)
    runs = [_lloyd(products_EE, _seeds(distance_EE, count, generator)) for _ in range(_RESTARTS)]
    return min(runs, key=lambda run: run[1])[0]


def _seeds(distance_EE: np.ndarray, count: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each seed is drawn in proportion to its squared distance from those before; labels by the nearest, [E]."""
    seeds = [int(generator.integers(len(distance_EE)))]
    while len(seeds) < count:
        nearest_E = distance_EE[seeds].min(axis=0)
        nearest_E[seeds] = 0
        left = np.setdiff1d(np.arange(len(distance_EE)), seeds)
        total = nearest_E.sum()
        weights_E = nearest_E / total if total > 0 else np.isin(np.arange(len(distance_EE)), left) / len(left)
        seeds.append(int(generator.choice(len(distance_EE), p=weights_E)))
    labels_E: np.ndarray = distance_EE[seeds].argmin(axis=0)
    labels_E[seeds] = np.arange(count)
    return labels_E


def _lloyd(products_EE: np.ndarray, labels_E: np.ndarray) -> tuple[np.ndarray, float]:
    """Lloyd's iteration on inner products: labels, and the sum of squared distances from the clusters' means."""
    count = int(labels_E.max()) + 1
    distance_EC = _to_means(products_EE, labels_E, count)
    for _ in range(_MOST_STEPS):
        moved_E = _filled(distance_EC.argmin(axis=1), distance_EC, count)
        if (moved_E == labels_E).all():
            break
        labels_E = moved_E
        distance_EC = _to_means(products_EE, labels_E, count)
    return labels_E, float(distance_EC[np.arange(len(labels_E)), labels_E].sum())


def _to_means(products_EE: np.ndarray, labels_E: np.ndarray, count: int) -> np.ndarray:
    """Squared distance of each expert from the mean of each cluster, [E, C]."""
    share_EC = (labels_E[:, None] == np.arange(count)).astype(float)
    share_EC /= share_EC.sum(axis=0)
    cross_EC = products_EE @ share_EC
    return np.asarray(np.diag(products_EE)[:, None] - 2 * cross_EC + np.einsum("ec,ec->c", share_EC, cross_EC))


def _filled(labels_E: np.ndarray, distance_EC: np.ndarray, count: int) -> np.ndarray:
    """Give each empty cluster the expert that is farthest from its own mean, of clusters that have others."""
    labels_E = labels_E.copy()
    for empty in np.setdiff1d(np.arange(count), labels_E):
        sizes_C = np.bincount(labels_E, minlength=count)
        own_E = np.where(sizes_C[labels_E] > 1, distance_EC[np.arange(len(labels_E)), labels_E], -1.0)
        labels_E[own_E.argmax()] = empty
    return labels_E


def centred(labels_E: np.ndarray, scores_E: np.ndarray) -> np.ndarray:
    """The grouping of some clusters: each expert joins the one of the best score in its cluster, [E]."""
    centre_E = np.empty(len(labels_E), np.int64)
    for label in np.unique(labels_E):
        members = np.flatnonzero(labels_E == label)
        centre_E[members] = members[np.argmax(scores_E[members])]
    return centre_E


def group_weights(values_E: np.ndarray, members: np.ndarray) -> np.ndarray:
    """The weights of a group's members in proportion to frequencies or scores; equal ones where none is above 0."""
    values = np.maximum(values_E[members], 0.0)
    positive = values[values > 0]
    if not len(positive):
        return np.full(len(members), 1 / len(members))
    return np.asarray(values / values.sum())


def without_zeros(scores_E: np.ndarray) -> np.ndarray:
    """Scores with zeros replaced by the smallest that is not zero, or by 0.5 if that is smaller (REAM's code)."""
    positive = scores_E[scores_E > 0]
    least = min(0.5, float(positive.min())) if len(positive) else 0.5
    return np.where(scores_E > 0, scores_E, least)
