"""What `moerge compare` measures, from whole models in float64, slow and obvious. Nothing here comes from moerge.comparison.

Shapes: E experts, N parameters of all tensors of a region, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tests.helpers import reference

Models = Mapping[str, Mapping[str, np.ndarray]]


def vector(model: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.concatenate([model[name].ravel().astype(np.float64) for name in names])


def cosine(a_N: np.ndarray, b_N: np.ndarray) -> float:
    return float(a_N @ b_N / (np.linalg.norm(a_N) * np.linalg.norm(b_N)))


def pair(models: Models, a: str, b: str, names: Sequence[str]) -> dict[str, Any]:
    """A pair's figures; of task vectors where there is a base."""
    theta_a_N, theta_b_N = vector(models[a], names), vector(models[b], names)
    base_N = vector(models["base"], names) if "base" in models else np.zeros_like(theta_a_N)
    a_N, b_N = theta_a_N - base_N, theta_b_N - base_N
    opposite_N, both_N = np.sign(a_N) * np.sign(b_N) < 0, (a_N != 0) & (b_N != 0)
    weight_N = np.abs(a_N * b_N)
    distance = float(np.linalg.norm(theta_a_N - theta_b_N))
    return {
        "parameters": a_N.size,
        "cosine": cosine(a_N, b_N),
        "sign_conflict": opposite_N.mean(),
        "sign_conflict_changed": opposite_N[both_N].mean(),
        "sign_conflict_weighted": weight_N[opposite_N].sum() / weight_N.sum(),
        "distance": distance,
        "relative_distance": distance / np.sqrt(np.linalg.norm(theta_a_N) * np.linalg.norm(theta_b_N)),
        "parameter_cosine": cosine(theta_a_N, theta_b_N),
    }


def expert(models: Models, name: str, names: Sequence[str], weights: Sequence[float], density: float) -> dict[str, Any]:
    """An expert's figures on a base; TIES' thresholds are those of each tensor."""
    others = [other for other in models if other != "base"]
    base_N, theta_N = vector(models["base"], names), vector(models[name], names)
    tau_N = theta_N - base_N
    mean_N = np.mean([vector(models[other], names) - base_N for other in others], axis=0)
    shares = np.zeros(4)
    for tensor in names:
        shares += _ties(
            [models[other][tensor] - models["base"][tensor] for other in others], others.index(name), weights, density
        )
    mass, trimmed, outvoted, survives = shares
    return {
        "parameters": tau_N.size,
        "norm": float(np.linalg.norm(tau_N)),
        "relative_norm": float(np.linalg.norm(tau_N) / np.linalg.norm(base_N)),
        "base_cosine": cosine(theta_N, base_N),
        "changed": (tau_N != 0).mean(),
        "averaged": float(mean_N @ tau_N / (tau_N @ tau_N)),
        "trimmed": trimmed / mass,
        "outvoted": outvoted / mass,
        "survives": survives / mass,
    }


def _ties(taus: Sequence[np.ndarray], index: int, weights: Sequence[float], density: float) -> np.ndarray:
    tau_EN = np.stack([tau.ravel() for tau in taus])
    trimmed_EN = np.stack([reference.trim(tau_N, reference.threshold(tau_N, density)) for tau_N in tau_EN])
    weighted_EN = trimmed_EN * np.array(weights, np.float32)[:, None]
    agrees_EN = np.sign(weighted_EN) == reference.elected_signs(weighted_EN)
    size_N, kept_N = np.abs(tau_EN[index]).astype(np.float64), trimmed_EN[index] != 0
    won_N = kept_N & agrees_EN[index]
    return np.array([size_N.sum(), size_N[~kept_N].sum(), size_N[kept_N & ~won_N].sum(), size_N[won_N].sum()])
