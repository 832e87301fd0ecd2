"""Model stock, TSV-M, Iso-C and Iso-CTS against published implementations; WUDI, which is not ours."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers import reference
from tests.methods.oracle import Compared, Model, NotOurs, Oracle


def mean_cosine(tau_EN: np.ndarray) -> float:
    norms_E = np.linalg.norm(tau_EN, axis=1)
    pairs = np.triu_indices(len(tau_EN), 1)
    return float((tau_EN @ tau_EN.T / np.outer(norms_E, norms_E))[pairs].mean())


def stock(oracle: Oracle, case_id: str) -> None:
    """Theirs where task vectors point the same way on average; where they do not, ours is the base, and theirs beyond it."""
    parameters, base = oracle.cases[case_id]["params"], oracle.model("in/base")
    merged = oracle.merge(case_id, "model_stock", filter_wise=parameters["filter_wise"])
    seen = {True: 0, False: 0}
    for name, theirs in oracle.model(case_id).items():
        tau = np.stack([oracle.model(f"in/m{k}")[name] - base[name] for k in parameters["models"]]).astype(np.float64)
        columns = theirs.shape[-1] if parameters["filter_wise"] else theirs.size
        rows = [array.reshape(-1, columns) for array in (merged[name], theirs, base[name])]
        for place, (ours_C, theirs_C, base_C) in enumerate(zip(*rows, strict=True)):
            together = mean_cosine(tau.reshape(len(tau), -1, columns)[:, place]) >= 0
            seen[together] += 1
            np.testing.assert_allclose(ours_C, theirs_C if together else base_C, rtol=0, atol=oracle.cases[case_id]["atol"])
            if not together:
                mean_C = tau.reshape(len(tau), -1, columns)[:, place].mean(axis=0)
                assert float((theirs_C - base_C) @ mean_C) < 0
    assert seen[True]
    assert seen[False]


def stock_of_mean_cosines(oracle: Oracle, case_id: str) -> Model:
    return oracle.merge(case_id, "model_stock")


def spectral(oracle: Oracle, case_id: str) -> Model:
    """The merged task vector, which is what they publish."""
    method = "tsv_m" if "tsvm" in case_id else "iso_cts" if "iso_cts" in case_id else "iso_c"
    settings: dict[str, Any] = {}
    if method == "iso_cts":
        settings["common_space_fraction"] = oracle.cases[case_id]["params"]["common_space_fraction"]
    base = oracle.model("in/base")
    return {name: merged - base[name] for name, merged in oracle.merge(case_id, method, **settings).items()}


def equals_spectral(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, spectral(oracle, case_id))


def least_interference(oracle: Oracle, case_id: str) -> Model:
    """WUDI's minimum, which has a closed form: m (sum_k C_k) = sum_k tau_k C_k, C_k = tau_k^T tau_k / |tau_k|^2.

    What it minimises is lower there than where the published code stops.
    """
    base, found = oracle.model("in/base"), {}
    for name, theirs in oracle.model(case_id).items():
        models = [oracle.model(f"in/m{k}")[name] for k in oracle.cases[case_id]["params"]["models"]]
        taus = [(model - base[name]).astype(np.float64) for model in models]
        if theirs.ndim != 2:
            found[name] = reference.in_order(taus) / len(taus)
            continue
        grams = [tau.T @ tau / (tau**2).sum() for tau in taus]
        found[name] = sum(tau @ gram for tau, gram in zip(taus, grams, strict=True)) @ np.linalg.pinv(sum(grams), hermitian=True)
        interference = [
            sum((((merged - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus) for merged in (found[name], theirs)
        ]
        assert interference[0] < interference[1]
    return found


STEPS = "the point where Adam is after some steps from the sum of task vectors, far from the minimum; not a formula"

COMPARED: dict[str, Compared] = {
    "slerp_stock": {
        "mergekit_stock_2_fw0": stock,
        "mergekit_stock_2_fw1": stock,
        "mergekit_stock_3_fw1": stock,
        "mergekit_stock_4_fw0": stock,
    },
    "svd": {
        "fb_iso_c_2": equals_spectral,
        "fb_iso_c_4": equals_spectral,
        "iso_cts_2_f0.8": equals_spectral,
        "fb_iso_cts_2_f0.8": equals_spectral,
        "iso_cts_2_f0.5": equals_spectral,
        "fb_iso_cts_3_f0.8": equals_spectral,
        "iso_cts_3_f0.5": equals_spectral,
        "fb_iso_cts_3_f0.5": equals_spectral,
        "iso_cts_4_f0.5": equals_spectral,
        "tsvm_3": equals_spectral,
        "fb_tsvm_3": equals_spectral,
        "tsvm_4": equals_spectral,
    },
}

NOT_OURS: dict[str, NotOurs] = {
    "slerp_stock": {"fb_stock_4": ("the mean of angles; ours and mergekit's is of cosines", stock_of_mean_cosines)},
    "svd": {"tsvm_lossless_3": ("keeps all singular values of every expert; the paper keeps 1/K of them", spectral)},
    "wudi": {
        "wudi_2_it300": (STEPS, least_interference),
        "wudi_2_it2000": (STEPS, least_interference),
        "wudi_4_it300": (STEPS, least_interference),
        "fb_wudi_4_it300": (STEPS, least_interference),
    },
}
