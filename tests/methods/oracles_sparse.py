"""Magnitude pruning, DELLA, breadcrumbs and SCE against published implementations."""

from __future__ import annotations

from typing import Any

import numpy as np

import moerge
from tests.methods.oracle import Compared, Model, NotOurs, Oracle, density_for


def alone(method: str, tau: np.ndarray, **settings: Any) -> np.ndarray:
    """What a method leaves of one task vector."""
    return moerge.merge_state_dicts({"w": np.zeros_like(tau)}, [{"w": tau}], method=method, scale=1, threads=1, **settings)["w"]


def pruned_input(oracle: Oracle, case_id: str) -> np.ndarray:
    return oracle.arrays["in/e" if "_e_" in case_id else "in/x"]


def pruned(oracle: Oracle, case_id: str) -> Model:
    """Asking for as many as they keep: of each row, or of the tensor."""
    case, tau = oracle.cases[case_id], pruned_input(oracle, case_id)
    row = case["params"].get("scope") == "row"
    size = tau.shape[1] if row else tau.size
    density = density_for(case["kept"] // (len(tau) if row else 1), size)
    left = alone("magnitude_pruning", tau, density=density, scope="row" if row else "tensor")
    if case["params"].get("rescale") == "1/(1-rate)":
        return {"y": left / np.float32(case["params"]["keep"])}
    return {"y": left}


def equals_pruned(oracle: Oracle, case_id: str) -> None:
    merged = pruned(oracle, case_id)
    if f"{case_id}/y" in oracle.arrays:
        oracle.check(case_id, merged)
    else:  # all kept: only the count is published
        np.testing.assert_array_equal(merged["y"], pruned_input(oracle, case_id))
    assert np.count_nonzero(merged["y"]) == oracle.cases[case_id]["kept"]


def rescaled(oracle: Oracle, case_id: str) -> None:
    """The option itself, at a density that keeps the same count."""
    keep = oracle.cases[case_id]["params"]["keep"]
    tau = pruned_input(oracle, case_id)
    assert keep * tau.size == oracle.cases[case_id]["kept"]
    oracle.check(case_id, {"y": alone("magnitude_pruning", tau, density=keep) / np.float32(keep)})
    np.testing.assert_allclose(
        alone("magnitude_pruning", tau, density=keep, rescale=True), oracle.model(case_id)["y"], rtol=2**-23, atol=0
    )


DRAWS = 200


def della_input(oracle: Oracle, case_id: str) -> np.ndarray:
    return oracle.arrays["in/b" if "_b_" in case_id else "in/x"]


def della_draws(oracle: Oracle, case_id: str) -> tuple[np.ndarray, np.ndarray]:
    """The probability of every entry, from what survivors are divided by, and how often it survived."""
    tau, parameters = np.atleast_2d(della_input(oracle, case_id)), oracle.cases[case_id]["params"]
    window = {key: parameters[key] for key in ("density", "epsilon")}
    merged = alone("della", np.tile(tau, (DRAWS, 1)), **window, elect="none", aggregate="sum").reshape(DRAWS, *tau.shape)
    survived = merged != 0
    assert survived.any(axis=0).all()
    return tau / np.abs(merged).max(axis=0) * np.sign(tau), survived.mean(axis=0)


def della_probabilities(oracle: Oracle, case_id: str) -> Model:
    return {**oracle.model(case_id), "keep_prob": della_draws(oracle, case_id)[0]}


def della_ranks(oracle: Oracle, case_id: str) -> None:
    """Probabilities are theirs, drawn as often as they say; theirs too divides survivors by them."""
    kept, frequency = della_draws(oracle, case_id)
    expected = oracle.model(case_id)["keep_prob"]
    np.testing.assert_allclose(kept, expected, rtol=0, atol=oracle.cases[case_id]["atol"])
    assert np.all(np.abs(frequency - kept) < 5 * np.sqrt(kept * (1 - kept) / DRAWS))
    merged = np.atleast_2d(oracle.model(case_id)["y"])
    chosen = merged != 0
    np.testing.assert_allclose((merged * expected)[chosen], np.atleast_2d(della_input(oracle, case_id))[chosen], rtol=1e-6)


def della_ranks_only(oracle: Oracle, case_id: str) -> None:
    """Probabilities are theirs, but mergekit multiplies all survivors by what restores the L1 norm."""
    kept, _ = della_draws(oracle, case_id)
    np.testing.assert_allclose(kept, oracle.model(case_id)["keep_prob"], rtol=0, atol=oracle.cases[case_id]["atol"])
    tau, merged = np.atleast_2d(della_input(oracle, case_id)), np.atleast_2d(oracle.model(case_id)["y"])
    chosen = merged != 0
    factor = np.abs(tau).sum() / np.abs(tau[chosen]).sum()
    np.testing.assert_allclose(merged[chosen] / tau[chosen], factor, rtol=1e-5)
    assert np.abs(factor - 1 / kept[chosen]).max() > 0.1


def breadcrumbs_of_rows(oracle: Oracle, case_id: str) -> None:
    parameters, merged = oracle.cases[case_id]["params"], {}
    for name in ("x", "b"):
        tau = oracle.arrays[f"in/{name}"]
        size, remove = tau.shape[-1], int(tau.shape[-1] * parameters["top_k_remove"])
        keep = int(size * parameters["top_k_keep"])
        kept = min(keep, size - remove) if parameters["remove_first"] else keep - remove
        settings = {"density": density_for(kept, size), "gamma": parameters["top_k_remove"], "scope": "row"}
        merged[name] = alone("breadcrumbs", tau, **settings)
    oracle.check(case_id, merged)


def breadcrumbs_of_tensors(oracle: Oracle, case_id: str) -> None:
    parameters, tau = oracle.cases[case_id]["params"], della_input(oracle, case_id)
    kept = int(parameters["density"] * tau.size)
    assert kept == oracle.cases[case_id]["kept"]
    oracle.check(case_id, {"y": alone("breadcrumbs", tau, density=density_for(kept, tau.size), gamma=parameters["gamma"])})


def sce(oracle: Oracle, case_id: str) -> Model:
    return oracle.merge(case_id, "sce", select_topk=oracle.cases[case_id]["params"]["select_topk"])


def equals_sce(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, sce(oracle, case_id))


L1 = "restores the L1 norm, which no paper on magnitude pruning asks for"
CRASHES = "crashes where everything is kept"
LAYER = "ranks over the whole tensor; the paper, its published MagPrune and ours rank each row"
SAMPLED = "probabilities by magnitude between the smallest and the largest; the paper's and ours by rank"

COMPARED: dict[str, Compared] = {
    "magnitude": {
        "mergelm_e_keep0.2": equals_pruned,
        "mergelm_x_keep0.2_rescale": rescaled,
        "ties_x_keep0.5": equals_pruned,
        "mergekit_x_keep0.5": equals_pruned,
        "mergekit_e_keep0.5": equals_pruned,
        "della_rowwise_e_keep0.5": equals_pruned,
        "mergelm_x_keep0.8": equals_pruned,
        "ties_x_keep0.8": equals_pruned,
        "della_rowwise_x_keep0.8": equals_pruned,
        "mergekit_e_keep0.8": equals_pruned,
        "mergekit_l1_x_keep1.0": equals_pruned,
        "mergekit_l1_e_keep1.0": equals_pruned,
        "della_rowwise_e_keep1.0": equals_pruned,
        "fb_x_keep0.5": equals_pruned,
        "fb_x_keep0.8": equals_pruned,
    },
    "della_breadcrumbs": {
        "della_rank_magnitude_x_d0.5_e0.1": della_ranks,
        "della_rank_magnitude_b_d0.5_e0.1": della_ranks,
        "della_rank_magnitude_layer_b_d0.5_e0.1": della_ranks,
        "mergekit_della_x_d0.5_e0.1": della_ranks_only,
        "mergekit_della_x_d0.3_e0.2": della_ranks_only,
        "mergekit_della_x_d0.8_e0.15": della_ranks_only,
        "mergekit_della_b_d0.5_e0.1": della_ranks_only,
        "breadcrumbs_keep0.85_remove0.01_first1": breadcrumbs_of_rows,
        "breadcrumbs_keep0.5_remove0.1_first1": breadcrumbs_of_rows,
        "breadcrumbs_keep0.5_remove0.1_first0": breadcrumbs_of_rows,
        "breadcrumbs_keep0.2_remove0.05_first0": breadcrumbs_of_rows,
        "mergekit_breadcrumbs_x_d0.9_g0.01": breadcrumbs_of_tensors,
        "mergekit_breadcrumbs_b_d0.2_g0.05": breadcrumbs_of_tensors,
        "mergekit_breadcrumbs_x_d0.95_g0.1": breadcrumbs_of_tensors,
    },
    "sce": {
        "mergekit_topk0.1_4": equals_sce,
        "mergekit_topk0.5_2": equals_sce,
        "mergekit_topk0.5_4": equals_sce,
        "mergekit_topk1.0_2": equals_sce,
        "mergekit_topk1.0_4": equals_sce,
        "fuseai_topk1.0_2": equals_sce,
        "fuseai_topk1.0_4": equals_sce,
    },
}

NOT_OURS: dict[str, NotOurs] = {
    "magnitude": {
        "mergekit_l1_x_keep0.2": (L1, pruned),
        "mergekit_l1_x_keep0.8": (L1, pruned),
        "mergekit_l1_e_keep0.8": (L1, pruned),
        "mergelm_x_keep1.0": (CRASHES, None),
        "ties_x_keep1.0": (CRASHES, None),
        "mergelm_e_keep1.0": (CRASHES, None),
        "ties_e_keep1.0": (CRASHES, None),
        "mergelm_x_keep1.0_rescale": (CRASHES, None),
    },
    "della_breadcrumbs": {
        "della_rank_magnitude_layer_x_d0.3_e0.2": (LAYER, della_probabilities),
        "della_rank_magnitude_layer_x_d0.8_e0.15": (LAYER, della_probabilities),
        "della_magnitude_sample_b_d0.5_e0.1": (SAMPLED, della_probabilities),
        "della_magnitude_sample_b_d0.3_e0.2": (SAMPLED, della_probabilities),
        "della_magnitude_sample_b_d0.8_e0.15": (SAMPLED, della_probabilities),
    },
    "sce": {
        "fuseai_topk0.5_2": ("merges entries that it did not select, which count only in the weights", sce),
    },
}
