"""Groups against brute force and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage

from moerge.errors import InputError
from moerge.reduction.groups import (
    centred,
    group_weights,
    hierarchical_labels,
    kmeans_labels,
    ream_groups,
    ream_similarity,
    without_zeros,
)


def partition(labels_E: np.ndarray) -> set[frozenset[int]]:
    """Clusters, whatever they are called."""
    return {frozenset(np.flatnonzero(labels_E == label).tolist()) for label in np.unique(labels_E)}


def naive_average_linkage(points_ED: np.ndarray, count: int) -> set[frozenset[int]]:
    """HC-SMoE as its paper prints it."""
    clusters = [[expert] for expert in range(len(points_ED))]

    def distance(one: list[int], other: list[int]) -> float:
        return float(np.mean([np.linalg.norm(points_ED[i] - points_ED[j]) for i in one for j in other]))

    while len(clusters) > count:
        one, other = min(itertools.combinations(clusters, 2), key=lambda pair: distance(*pair))
        clusters = [cluster for cluster in clusters if cluster not in (one, other)] + [one + other]
    return {frozenset(cluster) for cluster in clusters}


@pytest.mark.parametrize("count", [1, 3, 6, 9, 10])
def test_hierarchical_clusters_are_those_of_a_loop_and_of_scipy(count: int) -> None:
    points_ED = np.random.default_rng(count).standard_normal((10, 4))
    labels_E = hierarchical_labels(points_ED, count)
    assert len(partition(labels_E)) == count
    assert partition(labels_E) == naive_average_linkage(points_ED, count)
    assert partition(labels_E) == partition(fcluster(linkage(points_ED, "average"), count, "maxclust"))


def test_identical_experts_join_first() -> None:
    points_ED = np.random.default_rng(0).standard_normal((6, 4))
    points_ED[4] = points_ED[1]
    assert frozenset({1, 4}) in partition(hierarchical_labels(points_ED, 5))
    assert frozenset({1, 4}) in partition(kmeans_labels(points_ED @ points_ED.T, 5))


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_kmeans_on_products_finds_the_least_cost_of_all_partitions(count: int) -> None:
    points_ED = np.random.default_rng(7).standard_normal((6, 20))
    points_ED[3:] += 2

    def cost(labels: np.ndarray) -> float:
        return sum(float(((points_ED[labels == c] - points_ED[labels == c].mean(axis=0)) ** 2).sum()) for c in np.unique(labels))

    labels_E = kmeans_labels(points_ED @ points_ED.T, count, seed=3)
    every = (np.array(labels) for labels in itertools.product(range(count), repeat=6) if len(set(labels)) == count)
    assert len(partition(labels_E)) == count
    np.testing.assert_allclose(cost(labels_E), min(map(cost, every)), rtol=1e-9)


def test_kmeans_leaves_no_cluster_empty_where_experts_are_alike() -> None:
    assert len(partition(kmeans_labels(np.ones((5, 5)), 3))) == 3


def test_similarity_is_the_mean_of_outputs_and_logits() -> None:
    rng = np.random.default_rng(0)
    logits_TE, cosine_EE = rng.standard_normal((30, 4)), np.corrcoef(rng.standard_normal((4, 9)))
    columns_TE = logits_TE / np.linalg.norm(logits_TE, axis=0)
    distance_EE = np.array([[np.linalg.norm(columns_TE[:, i] - columns_TE[:, j]) for j in range(4)] for i in range(4)])
    expected_EE = ((1 + cosine_EE) / 2 + 1 - distance_EE / distance_EE.max()) / 2
    np.testing.assert_allclose(ream_similarity(cosine_EE, logits_TE.T @ logits_TE), expected_EE, atol=1e-7)


def test_the_best_expert_absorbs_what_is_most_like_it() -> None:
    similarity_EE = np.random.default_rng(1).random((7, 7))
    scores_E = np.array([1.0, 9, 2, 8, 3, 4, 5])
    nobody_E = np.zeros(7, bool)
    centre_E = ream_groups(similarity_EE, scores_E, (1, 3, 6), nobody_E, capacity=3)
    first = sorted((0, 2, 4, 5), key=lambda e: -similarity_EE[1, e])[:2]
    assert {e: int(centre_E[e]) for e in first} == dict.fromkeys(first, 1)
    assert {int(centre_E[e]) for e in range(7) if e not in (1, 3, 6, *first)} == {3}
    assert [int(centre_E[e]) for e in (1, 3, 6)] == [1, 3, 6]
    whole_E = ream_groups(similarity_EE, scores_E, (1, 3, 6), nobody_E)
    assert {int(whole_E[e]) for e in (0, 2, 4, 5)} == {1}


def test_too_small_groups_are_refused() -> None:
    with pytest.raises(InputError, match=r"reduce\.capacity"):
        ream_groups(np.ones((8, 8)), np.arange(8.0), (6, 7), np.zeros(8, bool), capacity=3)


def test_a_protected_expert_absorbs_nothing() -> None:
    protected_E = np.array([True, False, False])
    assert ream_groups(np.ones((3, 3)), np.array([3.0, 2, 1]), (0, 1), protected_E).tolist() == [0, 1, 1]


def test_a_cluster_is_called_after_its_best_member() -> None:
    assert centred(np.array([0, 1, 0, 1]), np.array([1.0, 2, 3, 2])).tolist() == [2, 1, 2, 1]


def test_weights_sum_to_one_and_never_divide_by_zero() -> None:
    np.testing.assert_allclose(group_weights(np.array([3.0, 0, 1]), np.array([0, 2])), [0.75, 0.25])
    np.testing.assert_allclose(group_weights(np.zeros(3), np.array([0, 1])), [0.5, 0.5])
    assert without_zeros(np.array([0.0, 3, 2])).tolist() == [0.5, 3, 2]
    assert without_zeros(np.array([0.0, 0.1])).tolist() == [0.1, 0.1]
