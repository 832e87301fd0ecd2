"""Scores against loops over tokens, and who stays."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.reduction.scores import SCORES, Score, keep, mone_scores, order_of, scores_of, super_experts, table_of

EXPERTS, CHOSEN, WIDTH = 5, 2, 3


def routed(seed: int, tokens: int = 40, experts: int = EXPERTS - 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts, gates and outputs of some tokens; the last expert gets none."""
    rng = np.random.default_rng(seed)
    chosen_TK = np.stack([rng.permutation(experts)[:CHOSEN] for _ in range(tokens)])
    return chosen_TK, rng.random((tokens, CHOSEN)), rng.standard_normal((tokens, CHOSEN, WIDTH))


def by_hand(chosen_TK: np.ndarray, gates_TK: np.ndarray, outputs_TKD: np.ndarray, score: Score) -> list[float]:
    """Each score as its paper has it."""
    values: dict[int, list[float]] = {expert: [] for expert in range(EXPERTS)}
    for token, row in enumerate(chosen_TK):
        for place, expert in enumerate(row):
            norm = sum(float(v) ** 2 for v in outputs_TKD[token, place]) ** 0.5
            values[int(expert)].append(float(gates_TK[token, place]) ** score.gate * norm**score.norm)
    return [sum(v) / (len(v) if score.mean and v else 1) for v in values.values()]


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_of_a_loop_over_tokens(name: str) -> None:
    chosen_TK, gates_TK, outputs_TKD = routed(1)
    table = table_of(chosen_TK, gates_TK, np.linalg.norm(outputs_TKD, axis=2), EXPERTS)
    np.testing.assert_allclose(
        scores_of(table, SCORES[name]), by_hand(chosen_TK, gates_TK, outputs_TKD, SCORES[name]), rtol=1e-12
    )


def test_an_expert_that_no_token_goes_to_scores_nothing() -> None:
    chosen_TK, gates_TK, outputs_TKD = routed(2)
    table = table_of(chosen_TK, gates_TK, np.linalg.norm(outputs_TKD, axis=2), EXPERTS)
    sums_ED = np.zeros((EXPERTS, WIDTH))
    assert all(scores_of(table, score)[-1] == 0 for score in SCORES.values())
    assert mone_scores(table, sums_ED)[-1] == 0


def test_means_are_sums_where_every_expert_gets_as_many_tokens() -> None:
    chosen_TK = np.array([[0, 1], [1, 2], [2, 0]])
    table = table_of(chosen_TK, np.full((3, 2), 0.5), np.array([[1.0, 2], [3, 4], [5, 6]]), 3)
    for gate in range(3):
        for norm in range(3):
            mean, total = (scores_of(table, Score(flag, gate, norm)) for flag in (True, False))
            np.testing.assert_allclose(2 * mean, total)


@given(st.integers(0, 100), st.floats(0.25, 8), st.sampled_from([(a, b) for a in range(3) for b in range(3)]))
def test_scaling_an_output_scales_its_score(seed: int, factor: float, powers: tuple[int, int]) -> None:
    chosen_TK, gates_TK, outputs_TKD = routed(seed)
    norms_TK = np.linalg.norm(outputs_TKD, axis=2)
    score = Score(True, *powers)
    plain = scores_of(table_of(chosen_TK, gates_TK, norms_TK, EXPERTS), score)
    scaled = scores_of(table_of(chosen_TK, gates_TK, np.where(chosen_TK == 1, factor * norms_TK, norms_TK), EXPERTS), score)
    np.testing.assert_allclose(scaled[1], plain[1] * factor ** powers[1], rtol=1e-9)
    np.testing.assert_array_equal(np.delete(scaled, 1), np.delete(plain, 1))


def test_tables_of_two_texts_add_up() -> None:
    first, second = routed(3), routed(4)
    both = [np.concatenate(pair) for pair in zip(first, second, strict=True)]
    tables = [table_of(c, g, np.linalg.norm(o, axis=2), EXPERTS) for c, g, o in (first, second, both)]
    np.testing.assert_allclose(tables[0] + tables[1], tables[2], rtol=1e-12)


def test_mone_is_the_spread_of_outputs_times_the_mean_gate() -> None:
    chosen_TK, gates_TK, outputs_TKD = routed(5)
    table = table_of(chosen_TK, gates_TK, np.linalg.norm(outputs_TKD, axis=2), EXPERTS)
    sums_ED = np.stack([outputs_TKD[chosen_TK == expert].sum(axis=0) for expert in range(EXPERTS)])
    for expert in range(EXPERTS - 1):
        own_ND = outputs_TKD[chosen_TK == expert]
        expected = np.linalg.norm(own_ND.std(axis=0)) * gates_TK[chosen_TK == expert].mean()
        np.testing.assert_allclose(mone_scores(table, sums_ED)[expert], expected, rtol=1e-9)


def test_a_dead_expert_goes_first_whenever_norms_count() -> None:
    chosen_TK, gates_TK, outputs_TKD = routed(6, experts=EXPERTS)
    norms_TK = np.where(chosen_TK == 2, 0.0, np.linalg.norm(outputs_TKD, axis=2))
    table = table_of(chosen_TK, gates_TK, norms_TK, EXPERTS)
    for score in SCORES.values():
        if score.norm:
            assert order_of(scores_of(table, score))[-1] == 2


@given(st.permutations(range(6)), st.integers(1, 6), st.sampled_from(["pooled", "union"]))
def test_renumbering_experts_renumbers_the_choice(order: list[int], count: int, rule: str) -> None:
    scores_CE = np.random.default_rng(0).random((2, 6))
    plain = keep(scores_CE, scores_CE.sum(axis=0), count, rule)  # type: ignore[arg-type]
    moved_CE = scores_CE[:, order]
    moved = keep(moved_CE, moved_CE.sum(axis=0), count, rule)  # type: ignore[arg-type]
    assert {order[expert] for expert in moved} == set(plain)


def test_equal_scores_keep_the_lower_number() -> None:
    assert keep(np.ones((1, 4)), np.ones(4), 2, "pooled") == (0, 1)


def test_the_union_holds_the_best_of_each_domain() -> None:
    scores_CE = np.array([[9.0, 5, 4, 3, 0, 0], [0, 0, 0, 1, 3, 2]])
    pooled_E = scores_CE.sum(axis=0)
    assert keep(scores_CE, pooled_E, 3, "pooled") == (0, 1, 2)
    assert keep(scores_CE, pooled_E, 3, "union") == (0, 1, 4)  # the best of each, and the best of all that is left
    assert keep(scores_CE, pooled_E, 4, "union") == (0, 1, 4, 5)


def test_protected_experts_stay() -> None:
    protected_E = np.array([False, False, False, True])
    for rule in ("pooled", "union"):
        assert 3 in keep(np.array([[3.0, 2, 1, 0]]), np.array([3.0, 2, 1, 0]), 1, rule, protected_E)  # type: ignore[arg-type]


def test_super_experts_tower_above_the_rest_of_the_early_layers() -> None:
    peak_LE = np.random.default_rng(0).random((8, 64))
    peak_LE[2, 5], peak_LE[7, 1] = 1000.0, 900.0
    assert [tuple(map(int, place)) for place in np.argwhere(super_experts(peak_LE))] == [(2, 5)]
