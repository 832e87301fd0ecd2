"""Every way of merging that is measured, as recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moerge

from .settings import EXPERTS, Work

SCALES = (0.2, 0.3333, 0.6, 1.0)
"""Tried for every method that adds up task vectors: the average's, and up to their sum."""
DENSE: Mapping[str, Mapping[str, Any]] = {
    "task arithmetic": {"method": "task_arithmetic"},
    "TIES": {"method": "ties", "density": 0.8},
    "DARE": {"method": "dare", "density": 0.8},
}
"""Methods with a scale, which is tuned on calibration text, all alike."""
AVERAGE, TIES, DARE = {"method": "average"}, {**DENSE["TIES"], "scale": 0.3333}, {**DENSE["DARE"], "scale": 0.3333}
ALL = ["ffn", "attention"]


@dataclass(frozen=True)
class Row:
    """A recipe without its models: `merge` for what is not separate, and the `moe` section of a mixture."""

    merge: Mapping[str, Any]
    moe: Mapping[str, Any] | None = None
    calibrated: bool = False
    """Whether the router is computed from calibration text."""


def native(merge: Mapping[str, Any], router: str, top_k: int = 2) -> Row:
    """A mixture in the family's own format (Mixtral), routed by token."""
    return Row(merge, {"top_k": top_k, "router": {"kind": router}}, calibrated=router in ("ridge", "perplexity"))


def routed(router: str, top_k: int = 2, separate: tuple[str, ...] = ("ffn", "attention"), **moe: Any) -> Row:
    """A mixture that routes whole sequences, the rest by DARE as in the paper."""
    return Row(DARE, {"format": "moerge", "separate": list(separate), "top_k": top_k, "router": {"kind": router}, **moe})


FFN = ("ffn",)
MIXTURES: Mapping[str, Row] = {
    "separate attention, PPL, top 2": routed("perplexity"),
    "separate attention, PPL, top 1": routed("perplexity", 1),
    "BTX: average, random router": native(AVERAGE, "random"),
    "TIES, ridge router": native(TIES, "ridge"),
    "TIES, random router": native(TIES, "random"),
    "average, ridge router": native(AVERAGE, "ridge"),
    "separate attention, task vector": routed("task_vector"),
    "merged attention, PPL, top 2": routed("perplexity", separate=FFN),
    "merged attention, PPL, top 1": routed("perplexity", 1, separate=FFN),
    "merged attention, task vector": routed("task_vector", separate=FFN),
    "merged attention, random": routed("random", separate=FFN),
    "DARE, random router": native(DARE, "random"),
    "DARE, ridge router": native(DARE, "ridge"),
    "average, perplexity router": native(AVERAGE, "perplexity"),
    "TIES, perplexity router": native(TIES, "perplexity"),
    "DARE, perplexity router": native(DARE, "perplexity"),
    "separate attention, PPL, top 2, mix logits": routed("perplexity", mix="logits"),
}
"""Most telling first: with little time the first ones are measured first."""


def recipe(work: Work, seed: int, row: Row, **sections: Any) -> dict[str, Any]:
    """A row's recipe with the models of a seed."""
    found: dict[str, Any] = {"base": str(work.base), "experts": work.experts(seed), "merge": _seeded(row.merge, seed)}
    if row.moe is not None:
        router = dict(row.moe["router"])
        found["moe"] = {**row.moe, "router": {**router, "seed": seed} if router["kind"] == "random" else router}
    if row.calibrated:
        found["calibration"] = work.calibration()
    return {**found, **sections}


def _seeded(merge: Mapping[str, Any], seed: int) -> dict[str, Any]:
    return {**merge, **({"seed": seed} if merge["method"] == "dare" else {})}


def merged(work: Work, seed: int, name: str, row: Row) -> Path:
    """The checkpoint of a row, which is made if it is not there."""
    out = work.made(seed, "merged", name)
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        moerge.merge(recipe(work, seed, row), out)
    return out


def alone(work: Work, seed: int) -> dict[str, Path]:
    """The base and each expert by itself."""
    return {"base": work.base, **{f"{name} expert": work.expert(seed, name) for name in EXPERTS}}
