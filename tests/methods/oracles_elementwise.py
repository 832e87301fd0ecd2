"""Averages, task arithmetic, TIES, DARE and SLERP against published implementations.

Their quirks in counting what a density keeps are expressed by asking for that count (`density_for`), so that what is
compared is everything else: the threshold, ties at it, the election, the aggregate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import moerge
from tests.methods.oracle import Compared, Model, NotOurs, Oracle, density_for


def one_more(density: float, size: int) -> int:
    """The original TIES and FusionBench keep from the (d - int(d * K))-th smallest on: int(d * K) + 1 entries."""
    return int(size * density) + 1


def one_more_than_not_masked(density: float, size: int) -> int:
    """MergeLM rounds the masked share down, and keeps from the last masked entry on."""
    return size - int(size * (1 - density)) + 1


def rounded_down(density: float, size: int) -> int:
    """mergekit keeps int(density * n) of each tensor."""
    return int(density * size)


Kept = Callable[[float, int], int]


def whole_size(oracle: Oracle) -> int:
    return sum(array.size for array in oracle.model("in/base").values())


def ties_of_model(oracle: Oracle, case_id: str, kept: Kept) -> Model:
    case = oracle.cases[case_id]
    parameters, size = case["params"], whole_size(oracle)
    count = kept(parameters["density"], size)
    assert case.get("kept_per_model", [count])[0] == count
    aggregate = "mean" if "mean" in parameters.get("agg", "mean") else "sum"
    density, scale = density_for(count, size), parameters.get("lambda", 1.0)
    return oracle.merge(case_id, "ties", density=density, scope="model", aggregate=aggregate, scale=scale)


def ties_of_tensors(oracle: Oracle, case_id: str, kept: Kept) -> Model:
    """Each tensor by itself, because the count that is kept is not the same fraction of all."""
    parameters = oracle.cases[case_id]["params"]
    settings = {"aggregate": "mean" if parameters["normalize"] else "sum", "scale": parameters.get("lambda", 1.0)}
    settings["weights"] = parameters.get("weights", [1, 1, 1, 1])
    merged = {}
    for name, array in oracle.model("in/base").items():
        density = density_for(kept(parameters["density"], array.size), array.size)
        merged[name] = oracle.merge(case_id, "ties", density=density, **settings)[name]
    return merged


def original(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, ties_of_model(oracle, case_id, one_more))


def original_untrimmed(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, oracle.merge(case_id, "ties", density=1, scope="model", scale=1))


def mergelm_ties(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, ties_of_model(oracle, case_id, one_more_than_not_masked))


def mergekit_ties(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, ties_of_tensors(oracle, case_id, rounded_down))


def mergeme(oracle: Oracle, case_id: str) -> None:
    """The paper: our defaults but for the density and scale, without any adjustment."""
    parameters = oracle.cases[case_id]["params"]
    scope = {"global": "model", "tensor": "tensor"}[parameters["scope"]]
    settings = {"density": parameters["density"], "scale": parameters["lambda"], "scope": scope}
    oracle.check(case_id, oracle.merge(case_id, "ties", **settings))


def trimmed_edge(oracle: Oracle, case_id: str) -> None:
    """Entries that equal the threshold are all kept, so more are kept than the density asks for."""
    tau_EN = oracle.arrays["in/edge/task_vectors"]
    density = density_for(one_more(oracle.cases[case_id]["params"]["density"], tau_EN.shape[1]), tau_EN.shape[1])
    for tau_N, expected_N in zip(tau_EN, oracle.arrays[f"{case_id}/trimmed"], strict=True):
        np.testing.assert_array_equal(ties_of_taus(tau_N[None], density), expected_N)


def zero_sums_elect_plus(oracle: Oracle, case_id: str) -> None:
    np.testing.assert_array_equal(ties_of_taus(oracle.arrays["in/edge/task_vectors"], 1), oracle.arrays[f"{case_id}/merged_sum"])


def ties_of_taus(tau_EN: np.ndarray, density: float) -> np.ndarray:
    base, experts = {"w": np.zeros_like(tau_EN[0])}, [{"w": tau_N} for tau_N in tau_EN]
    return moerge.merge_state_dicts(base, experts, method="ties", density=density, scale=1, threads=1)["w"]


def average(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, oracle.merge(case_id, "average"))
    oracle.check(case_id, oracle.merge(case_id, "dare", density=1, scale=1, aggregate="mean"))


def task_arithmetic(oracle: Oracle, case_id: str) -> None:
    parameters = oracle.cases[case_id]["params"]
    sign = -1 if parameters.get("negate") else 1
    weights = [sign * weight for weight in parameters.get("weights", [1] * len(parameters["models"]))]
    scale = parameters.get("scaling", parameters.get("lambda"))
    normalize = parameters.get("normalize", False)
    oracle.check(case_id, oracle.merge(case_id, "task_arithmetic", weights=weights, scale=scale, normalize=normalize))


def undropped_task_arithmetic(oracle: Oracle, case_id: str) -> None:
    oracle.check(case_id, oracle.merge(case_id, "dare", density=1, scale=oracle.cases[case_id]["params"]["scaling"]))


def undropped_ties(oracle: Oracle, case_id: str) -> None:
    """Nothing is dropped, so what remains is TIES."""
    parameters, size = oracle.cases[case_id]["params"], whole_size(oracle)
    density = density_for(one_more_than_not_masked(parameters["ties_density"], size), size)
    settings = {"scope": "model", "aggregate": "mean", "scale": parameters["scaling"]}
    oracle.check(case_id, oracle.merge(case_id, "ties", density=density, **settings))


def dare_of(tau_N: np.ndarray, drop_rate: float, *, rescale: bool = True) -> np.ndarray:
    base, experts = {"w": np.zeros_like(tau_N)}, [{"w": tau_N}]
    density = round(1 - drop_rate, 6)
    return moerge.merge_state_dicts(base, experts, method="dare", density=density, rescale=rescale, scale=1, threads=1)["w"]


def dropping(oracle: Oracle, case_id: str) -> None:
    """The drop fraction within five sigma of the rate, as theirs is, and survivors multiplied by what they multiply by."""
    case = oracle.cases[case_id]
    rate, stats, rescale = case["params"]["drop_rate"], case["stats"], case["params"]["rescale"] is True
    tau_N = np.random.default_rng(0).uniform(0.5, 1, stats["n"]).astype(np.float32)
    merged_N = dare_of(tau_N, rate, rescale=rescale)
    kept_N = merged_N != 0
    for fraction in (1 - kept_N.mean(), stats["drop_fraction"]):
        assert abs(fraction - rate) < 5 * stats["sigma_of_drop_fraction"]
    factor_N = merged_N[kept_N].astype(np.float64) / tau_N[kept_N]
    assert factor_N.min() >= stats["survivor_factor_min"] * (1 - 2**-22)
    assert factor_N.max() <= stats["survivor_factor_max"] * (1 + 2**-22)


def dropping_nothing(oracle: Oracle, case_id: str) -> None:
    tau_N = oracle.arrays["in/v"]
    np.testing.assert_array_equal(dare_of(tau_N, oracle.cases[case_id]["params"]["drop_rate"]), tau_N)


def expectation(oracle: Oracle, case_id: str) -> None:
    """E[out] = in, and every entry is kept equally often: ours and theirs within five standard errors."""
    rate, draws = (oracle.cases[case_id]["params"][key] for key in ("drop_rate", "draws"))
    tau_N = oracle.arrays["in/v"]
    merged_DN = dare_of(np.tile(tau_N, draws), rate).reshape(draws, tau_N.size)
    means = merged_DN.mean(axis=0, dtype=np.float64), oracle.arrays[f"{case_id}/mean"]
    frequencies = (merged_DN != 0).mean(axis=0), oracle.arrays[f"{case_id}/keep_freq"]
    for mean_N, kept_N in zip(means, frequencies, strict=True):
        assert np.all(np.abs(mean_N - tau_N) <= 5 * np.abs(tau_N) * math.sqrt(rate / (1 - rate) / draws) + 1e-6)
        assert np.all(np.abs(kept_N - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / draws))


def slerp(oracle: Oracle, case_id: str) -> None:
    parameters = oracle.cases[case_id]["params"]
    settings = {key: parameters[key] for key in ("t", "dot_threshold")}
    oracle.check(case_id, oracle.merge(case_id, "slerp", **settings))


COMPARED: dict[str, Compared] = {
    "ties": {
        "official_K0.2_dis-mean": original,
        "official_K0.8_dis-mean": original,
        "official_K0.8_dis-sum": original,
        "official_notrim_dis-sum": original_untrimmed,
        "edge_trim_K0.5": trimmed_edge,
        "edge_trim_K0.3": trimmed_edge,
        "mergelm_mask0.5": mergelm_ties,
        "fb_K20_sum": original,
        "fb_K50_mean": original,
        "fb_K50_sum": original,
        "mergekit_d0.2_norm1": mergekit_ties,
        "mergekit_d0.8_norm1": mergekit_ties,
        "mergekit_d0.8_norm0": mergekit_ties,
        "mergekit_d1.0_norm1": mergekit_ties,
        "mergekit_d0.5_w": mergekit_ties,
        "edge_mergekit": zero_sums_elect_plus,
        "mergeme_p0.25_global_lam1.0": mergeme,
        "mergeme_p0.25_global_lam0.5": mergeme,
        "mergeme_p0.25_tensor_lam1.0": mergeme,
        "mergeme_p0.75_global_lam0.5": mergeme,
        "mergeme_p0.75_tensor_lam1.0": mergeme,
        "mergeme_p1.0_global_lam1.0": mergeme,
        "mergeme_p1.0_global_lam0.5": mergeme,
        "mergeme_p1.0_tensor_lam1.0": mergeme,
        "mergeme_p1.0_tensor_lam0.5": mergeme,
    },
    "average_ta": {
        "mergelm_average": average,
        "mergelm_ta_0.3": task_arithmetic,
        "taskvectors_negate_m0": task_arithmetic,
        "mergekit_ta_w1.0-0.5-0.25-0.25_norm0_lam1.0": task_arithmetic,
        "mergekit_ta_w1.0-0.5-0.25-0.25_norm1_lam1.0": task_arithmetic,
    },
    "dare": {
        "mergelm_p0.1_rescale0": dropping,
        "mergelm_p0.5_rescale0": dropping,
        "mergelm_p0.9_rescale0": dropping,
        "mergelm_p0.0": dropping_nothing,
        "fb_p0.5": dropping,
        "fb_p0.9": dropping,
        "mergekit_p0.9_none": dropping,
        "mergelm_mean_p0.5": expectation,
        "mergelm_mean_p0.9": expectation,
        "mergelm_mask_merging_average_merging_p0.0": average,
        "mergelm_mask_merging_task_arithmetic_p0.0": undropped_task_arithmetic,
        "mergelm_mask_merging_ties_merging_p0.0": undropped_ties,
    },
    "slerp_stock": {
        "fb_slerp_t0.0": slerp,
        "mergekit_slerp_t0.0": slerp,
        "fb_slerp_t0.25": slerp,
        "mergekit_slerp_t0.75": slerp,
        "mergekit_slerp_t1.0": slerp,
    },
}

NOT_OURS: dict[str, NotOurs] = {
    "ties": {
        "official_K0.5_dis-max": ("keeps the largest of what agrees", lambda o, i: ties_of_model(o, i, one_more)),
        "fb_K20_max": ("keeps the largest of what agrees", lambda o, i: ties_of_model(o, i, one_more)),
        "fb_K80_max": ("keeps the largest of what agrees", lambda o, i: ties_of_model(o, i, one_more)),
        "official_K1.0_dis-mean": ("crashes at density 1, where ours keeps everything", None),
        "official_K100_dis-mean": ("crashes at 100 percent, where ours refuses a density above 1", None),
        "official_K0.2_normmass_dis-mean": ("divides by norms to elect", lambda o, i: ties_of_model(o, i, one_more)),
        "edge2_official": (
            "zero sums elect the sign most frequent in the whole model, and the minus if that is none; ours elect plus",
            lambda o, i: {"dis-sum": ties_of_taus(o.arrays["in/edge2/task_vectors"], 1), "sign": np.ones(2, np.float32)},
        ),
        "mergekit_d0.5_count": ("elects by count", lambda o, i: ties_of_tensors(o, i, rounded_down)),
    },
}
