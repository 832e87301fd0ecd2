"""Merge methods as their papers print them, slow and obvious. Nothing here comes from moerge.

Everything is computed in the type of the arrays that are given: float64 for what is true, float32 for what a single pass in
float32, experts added in order and rounded once at the end, must give to the bit.

Shapes: E experts, N elements. tau_EN are task vectors, theta_expert - theta_base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

import numpy as np

Aggregate = Literal["sum", "mean"]


def in_order(terms: Sequence[np.ndarray]) -> np.ndarray:
    """((term_0 + term_1) + term_2) + ..., which np.sum does not promise."""
    total = terms[0].copy()
    for term in terms[1:]:
        total = total + term
    return total


def total_weight(weights: Sequence[float], kind: np.dtype) -> np.ndarray:
    return np.asarray(math.fsum(np.float32(weights))).astype(kind)


def average(theta_EN: np.ndarray) -> np.ndarray:
    """theta = 1/K * sum_k theta_k."""
    return in_order(list(theta_EN)) / theta_EN.dtype.type(len(theta_EN))


def linear(theta_EN: np.ndarray, weights: Sequence[float], *, normalize: bool = True) -> np.ndarray:
    """theta = sum_k w_k theta_k / sum_k w_k."""
    kind = theta_EN.dtype
    total = in_order([kind.type(weight) * theta_N for weight, theta_N in zip(weights, theta_EN, strict=True)])
    return total / total_weight(weights, kind) if normalize else total


def task_vectors(base_N: np.ndarray, theta_EN: np.ndarray) -> np.ndarray:
    return theta_EN - base_N


def add_scaled(base_N: np.ndarray, tau_N: np.ndarray, scale: float) -> np.ndarray:
    """theta_m = theta_b + lambda * tau_m (MergeME, section 3.1.2)."""
    return base_N + base_N.dtype.type(scale) * tau_N


def task_arithmetic(
    base_N: np.ndarray, theta_EN: np.ndarray, weights: Sequence[float], *, scale: float, normalize: bool = False
) -> np.ndarray:
    """theta_m = theta_b + lambda * sum_k w_k tau_k."""
    return add_scaled(base_N, linear(task_vectors(base_N, theta_EN), weights, normalize=normalize), scale)


def kept_count(density: float, size: int) -> int:
    """(1 - p) * N entries, rounded down, are dropped; the density counts as the decimal number people write."""
    exact = Context(prec=400)
    return int(exact.multiply(Decimal(str(density)), Decimal(size)).to_integral_value(ROUND_CEILING))


def threshold(tau_N: np.ndarray, density: float) -> float:
    """The magnitude of the last entry that is kept, from a full sort."""
    descending_N = np.sort(np.abs(tau_N))[::-1]
    return float(descending_N[kept_count(density, tau_N.size) - 1])


def trim(tau_N: np.ndarray, smallest_kept: float) -> np.ndarray:
    """Entries below the threshold are reset to zero; all that equal it stay."""
    return np.where(np.abs(tau_N) >= smallest_kept, tau_N, tau_N.dtype.type(0))


def elected_signs(tau_EN: np.ndarray) -> np.ndarray:
    """+1 or -1: the sign with the highest total magnitude; +1 where both weigh the same."""
    return np.where(in_order(list(tau_EN)) >= 0, 1, -1)


def disjoint_merge(tau_EN: np.ndarray, weights: Sequence[float], aggregate: Aggregate) -> np.ndarray:
    """Only values of the elected sign: their sum, or that divided by the weights behind it."""
    kind = tau_EN.dtype
    factors = [kind.type(weight) for weight in weights]
    weighted_EN = np.stack([factor * tau_N for factor, tau_N in zip(factors, tau_EN, strict=True)])
    agrees_EN = np.sign(weighted_EN) == elected_signs(weighted_EN)
    total_N = in_order([np.where(agrees_N, tau_N, kind.type(0)) for agrees_N, tau_N in zip(agrees_EN, weighted_EN, strict=True)])
    if aggregate == "sum":
        return total_N
    mass_N = in_order([np.where(agrees_N, factor, kind.type(0)) for agrees_N, factor in zip(agrees_EN, factors, strict=True)])
    return np.divide(total_N, mass_N, out=np.zeros_like(total_N), where=mass_N != 0)


def ties(
    base: Mapping[str, np.ndarray],
    experts: Sequence[Mapping[str, np.ndarray]],
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    scope: Literal["tensor", "model"] = "tensor",
    aggregate: Aggregate = "sum",
) -> dict[str, np.ndarray]:
    """Trim, elect, merge (Yadav et al. 2023, algorithm 1), over whole models of flat tensors."""
    taus = {name: task_vectors(base[name], np.stack([expert[name] for expert in experts])) for name in base}
    whole_EN = np.concatenate(list(taus.values()), axis=1)
    merged = {}
    for name, tau_EN in taus.items():
        spans_EN = whole_EN if scope == "model" else tau_EN
        trimmed_EN = np.stack([trim(tau_N, threshold(span_N, density)) for tau_N, span_N in zip(tau_EN, spans_EN, strict=True)])
        merged[name] = add_scaled(base[name], disjoint_merge(trimmed_EN, weights, aggregate), scale)
    return merged


def dare(
    base_N: np.ndarray,
    theta_EN: np.ndarray,
    kept_EN: np.ndarray,
    weights: Sequence[float],
    *,
    density: float,
    scale: float,
    rescale: bool = True,
    elect: Literal["none", "sign"] = "none",
    aggregate: Aggregate = "sum",
) -> np.ndarray:
    """Drop what the mask does not keep, divide the rest by the density, sum (MergeME) or elect first."""
    tau_EN = np.where(kept_EN, task_vectors(base_N, theta_EN), theta_EN.dtype.type(0))
    if rescale:
        tau_EN = tau_EN / theta_EN.dtype.type(density)
    if elect == "sign":
        return add_scaled(base_N, disjoint_merge(tau_EN, weights, aggregate), scale)
    return add_scaled(base_N, linear(tau_EN, weights, normalize=aggregate == "mean"), scale)


def slerp(first_N: np.ndarray, second_N: np.ndarray, t: float, dot_threshold: float = 0.9995) -> np.ndarray:
    """Along the great circle from one direction to the other; straight where they are almost parallel or one is zero."""
    norms = math.sqrt(math.fsum(first_N * first_N)) * math.sqrt(math.fsum(second_N * second_N))
    cosine = math.fsum(first_N * second_N) / norms if norms else 1.0
    if abs(cosine) >= dot_threshold:
        return (1 - t) * first_N + t * second_N
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first_N + math.sin(t * angle) * second_N) / math.sin(angle)


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published (Steele, Lea and Flood 2014; Vigna's splitmix64.c): a counter that is mixed."""
    word = (1 << 64) - 1
    state, outputs = seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & word
        mixed = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & word
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & word
        outputs.append(mixed ^ (mixed >> 31))
    return outputs


def dare_mask(key: int, size: int, density: float) -> np.ndarray:
    """Element i keeps if its half of output i // 2 (low half first) lies below density * 2**32."""
    halves = [half for word in splitmix64(key, (size + 1) // 2) for half in (word & 0xFFFFFFFF, word >> 32)]
    return np.array(halves[:size], np.uint64) < round(density * 2**32)


def merged_sum(tau_EN: np.ndarray, weights: Sequence[float], elect: str = "none", aggregate: Aggregate = "sum") -> np.ndarray:
    """All task vectors added up or averaged, or only what agrees with the elected sign."""
    if elect == "sign":
        return disjoint_merge(tau_EN, weights, aggregate)
    return linear(tau_EN, weights, normalize=aggregate == "mean")


def keep_ranks(tau_N: np.ndarray, first: int, last: int) -> np.ndarray:
    """Entries from the first to the last rank by magnitude (1 is the largest) stay, and all that equal one of those."""
    descending_N = np.sort(np.abs(tau_N))[::-1]
    highest, lowest = descending_N[first - 1], descending_N[last - 1]
    return np.where((np.abs(tau_N) >= lowest) & (np.abs(tau_N) <= highest), tau_N, tau_N.dtype.type(0))


def by_rows(tau_N: np.ndarray, columns: int, sparsify: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.concatenate([sparsify(row_C) for row_C in tau_N.reshape(-1, columns)])


def pruned(tau_N: np.ndarray, density: float) -> np.ndarray:
    """Magnitude pruning: the largest entries stay."""
    return keep_ranks(tau_N, 1, kept_count(density, tau_N.size))


def breadcrumbs(tau_N: np.ndarray, density: float, gamma: float) -> np.ndarray:
    """Davari and Belilovsky 2024, section 3: without the largest and the smallest entries."""
    kept = kept_count(density, tau_N.size)
    outliers = min(int(Decimal(str(gamma)) * tau_N.size), tau_N.size - kept)
    return keep_ranks(tau_N, outliers + 1, outliers + kept)


def della_probabilities(row_C: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """Deep et al. 2024, section 3.1: rising with the rank by magnitude; equal entries by position."""
    if density == 1 or row_C.size == 1:
        return np.full(row_C.size, density)
    kept_C = np.empty(row_C.size)
    for rank, place in enumerate(np.argsort(np.abs(row_C), kind="stable")):
        kept_C[place] = density - epsilon + 2 * epsilon * rank / (row_C.size - 1)
    return kept_C


def della(tau_N: np.ndarray, columns: int, key: int, density: float, epsilon: float, *, rescale: bool = True) -> np.ndarray:
    """MagPrune with our generator: entry i takes its half of output i // 2, low half first."""
    kept_N = np.concatenate([della_probabilities(row_C, density, epsilon) for row_C in tau_N.reshape(-1, columns)])
    halves = [half for word in splitmix64(key, (tau_N.size + 1) // 2) for half in (word & 0xFFFFFFFF, word >> 32)]
    chosen_N = np.array(halves[: tau_N.size], np.float64) < np.rint(kept_N * 2**32)
    rescaled_N = (tau_N / kept_N).astype(tau_N.dtype) if rescale and density < 1 else tau_N
    return np.where(chosen_N | (density == 1), rescaled_N, tau_N.dtype.type(0))


def model_stock(base_N: np.ndarray, theta_EN: np.ndarray) -> np.ndarray:
    """Jang et al. 2024, section 4.2: from the base towards the average, by a ratio from the angle; never to the other side."""
    tau_EN, experts = theta_EN - base_N, len(theta_EN)
    pairs = [(j, k) for j in range(experts) for k in range(j + 1, experts)]
    norms = [math.sqrt(math.fsum(tau_N * tau_N)) for tau_N in tau_EN]
    cosines = [math.fsum(tau_EN[j] * tau_EN[k]) / (norms[j] * norms[k]) if norms[j] * norms[k] else 0.0 for j, k in pairs]
    cosine = max(0.0, sum(cosines) / len(cosines)) if pairs else 1.0
    ratio = experts * cosine / (1 + (experts - 1) * cosine)
    return (1 - ratio) * base_N + ratio * in_order(list(theta_EN)) / experts


def sce(tau_EN: np.ndarray, select_topk: float) -> np.ndarray:
    """Wan et al. 2024, section 3.3: select by variance, weigh by energy, erase the minority."""
    if select_topk < 1:
        mean_N = in_order(list(tau_EN)) / tau_EN.dtype.type(len(tau_EN))
        variance_N = in_order([(tau_N - mean_N) * (tau_N - mean_N) for tau_N in tau_EN]) / tau_EN.dtype.type(len(tau_EN))
        selected = int(Decimal(str(select_topk)) * int(np.count_nonzero(variance_N)))
        smallest = np.sort(variance_N)[::-1][selected - 1] if selected else np.inf
        tau_EN = np.where(variance_N >= smallest, tau_EN, tau_EN.dtype.type(0))
    energies = [math.fsum(tau_N.astype(np.float64) ** 2) for tau_N in tau_EN]
    eta_E = np.array(energies) / sum(energies) if sum(energies) else np.zeros(len(tau_EN))
    left_EN = np.where(np.sign(tau_EN) == elected_signs(tau_EN), tau_EN, 0)
    mass_N = (eta_E[:, None] * (left_EN != 0)).sum(axis=0)
    return np.divide((eta_E[:, None] * left_EN).sum(axis=0), mass_N, out=np.zeros(tau_EN.shape[1]), where=mass_N != 0)


def procrustes(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


def tsv_m(tau_EOI: np.ndarray) -> np.ndarray:
    """Gargiulo et al. 2025, algorithm 1, for matrices of full rank."""
    rank = min(tau_EOI.shape[1:]) // len(tau_EOI)
    parts = [np.linalg.svd(tau_OI, full_matrices=False) for tau_OI in tau_EOI]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], axis=1)
    values = np.concatenate([s[:rank] for _, s, _ in parts])
    right = np.concatenate([v[:rank] for _, _, v in parts])
    return procrustes(left) * values @ procrustes(right)


def iso_c(tau_EOI: np.ndarray) -> np.ndarray:
    """Marczak et al. 2025, section 4.1: one singular value for all."""
    left, values, right = np.linalg.svd(tau_EOI.sum(axis=0), full_matrices=False)
    return values.mean() * left @ right


def iso_cts(tau_EOI: np.ndarray, fraction: float) -> np.ndarray:
    """Marczak et al. 2025, section 4.2, for matrices of full rank."""
    experts, smaller = len(tau_EOI), min(tau_EOI.shape[1:])
    own = round((smaller - int(smaller * fraction)) / experts)
    left, values, right = np.linalg.svd(tau_EOI.sum(axis=0), full_matrices=False)
    common = left[:, : smaller - experts * own]
    rests = [np.linalg.svd(tau_OI - common @ common.T @ tau_OI, full_matrices=False) for tau_OI in tau_EOI]
    left = np.concatenate([common, *(u[:, :own] for u, _, _ in rests)], axis=1)
    right = np.concatenate([right[: common.shape[1]], *(v[:own] for _, _, v in rests)])
    mean = (values[: common.shape[1]].sum() + sum(s[:own].sum() for _, s, _ in rests)) / smaller
    return mean * procrustes(left) @ procrustes(right)


def nuslerp(first_N: np.ndarray, second_N: np.ndarray, t: float) -> np.ndarray:
    """Shoemake's slerp of two vectors as they are, along the chord where they have no angle."""
    norms = np.linalg.norm(first_N) * np.linalg.norm(second_N)
    cosine = float(first_N @ second_N / norms) if norms else 1.0
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    if math.sqrt(max(0.0, 1 - cosine * cosine)) <= 1e-6:
        return (1 - t) * first_N + t * second_N
    return (math.sin((1 - t) * angle) * first_N + math.sin(t * angle) * second_N) / math.sin(angle)


def multislerp(theta_EN: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """mergekit's steps: to the tangent space at the mean direction, the mean there, and back by the exponential map."""
    weights_E = np.array(weights) / math.fsum(weights)
    norms_E = np.linalg.norm(theta_EN, axis=1)
    units_EN = np.divide(theta_EN, norms_E[:, None], out=np.zeros_like(theta_EN), where=norms_E[:, None] > 0)
    mean_N = weights_E @ units_EN
    if np.linalg.norm(mean_N) <= 1e-6 * np.abs(weights_E).sum():
        return weights_E @ theta_EN
    mean_N = mean_N / np.linalg.norm(mean_N)
    tangent_N = weights_E @ (units_EN - np.outer(units_EN @ mean_N, mean_N))
    length = np.linalg.norm(tangent_N)
    along_N = tangent_N * (math.sin(length) / length) if length else tangent_N
    return (weights_E @ norms_E) * (mean_N * math.cos(length) + along_N)


def karcher(theta_EN: np.ndarray, weights: Sequence[float], steps: int = 1000) -> np.ndarray:
    """The point on the unit sphere with the smallest sum of squared angles to the directions, by small gradient steps."""
    weights_E = np.array(weights) / math.fsum(weights)
    norms_E = np.linalg.norm(theta_EN, axis=1)
    units_EN = theta_EN[norms_E > 0] / norms_E[norms_E > 0, None]
    own_E = weights_E[norms_E > 0] / weights_E[norms_E > 0].sum()
    mean_N = own_E @ units_EN
    mean_N = mean_N / np.linalg.norm(mean_N)
    for _ in range(steps):
        step_N = np.zeros_like(mean_N)
        for weight, unit_N in zip(own_E, units_EN, strict=True):
            across_N = unit_N - (unit_N @ mean_N) * mean_N
            if (length := np.linalg.norm(across_N)) > 1e-12:
                step_N += weight * math.atan2(length, unit_N @ mean_N) * across_N / length
        mean_N = mean_N + 0.5 * step_N
        mean_N = mean_N / np.linalg.norm(mean_N)
    return (weights_E @ norms_E) * mean_N


def fusion_importance(base: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """|tau| times the divergence of the softmax of its row."""

    def log_softmax(rows: np.ndarray) -> np.ndarray:
        shifted = rows - rows.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    first, second = log_softmax(theta), log_softmax(base)
    return np.abs(theta - base) * (np.exp(first) * (first - second)).sum(axis=-1, keepdims=True)


def fusion_threshold(importance: np.ndarray) -> float:
    """The median and one and a half times what lies between the other quartiles, by a full sort."""
    ascending = np.sort(importance.reshape(-1))
    first, median, third = (ascending[int(share * (ascending.size - 1))] for share in (0.25, 0.5, 0.75))
    return float(median + 1.5 * (third - first))


def ram(tau_EN: np.ndarray, epsilon: float, *, r: float = 0.0, alpha: float = 0.0) -> np.ndarray:
    """Entry by entry: nothing where none changed it, the one's change, longer with r, or the mean change of several."""
    changed_EN = np.abs(tau_EN) > epsilon
    count_N = changed_EN.sum(axis=0)
    out_N = np.zeros(tau_EN.shape[1])
    for tau_N, changed_N in zip(tau_EN, changed_EN, strict=True):
        shared, own = (changed_N & (count_N > 1)).sum(), (changed_N & (count_N == 1)).sum()
        stretch = 1 + r * min(alpha, shared / own) if own else 1
        for index in np.flatnonzero(changed_N):
            out_N[index] += tau_N[index] * (stretch if count_N[index] == 1 else 1 / count_N[index])
    return out_N
