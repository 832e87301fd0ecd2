"""Held-out text, document by document, through `moerge eval`, and what a bootstrap over documents says about it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerge.evaluation.bootstrap import Estimate, bootstrap
from moerge.evaluation.run import Settings, evaluate

from .settings import Budget, Work

GIVEN = 256
"""Characters at the beginning of a document that are read and not predicted: models that route sequences route by them."""
Documents = dict[str, list[list[float]]]
"""Nats, tokens and bytes of each document, by domain."""


def measure(work: Work, budget: Budget, seed: int, name: str, checkpoint: Path, split: str = "valid") -> Documents:
    """A checkpoint on every domain's text; what is measured already is read."""
    out = work.made(seed, f"measured-{split}", name)
    limit = budget.heldout if split == "valid" else budget.calibration
    settings = Settings(texts=work.texts(split), limit=limit, given=GIVEN, dtype=budget.dtype, device=budget.device, batch_size=4)
    found = evaluate([checkpoint], settings, out=out, resume=(out / "results.json").exists())
    return {measured.on: _documents(out / str(measured.documents_file)) for measured in found.measures}


def _documents(path: Path) -> list[list[float]]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [[row["nats"], row["tokens"], row["bytes"]] for row in rows]


def bits(documents: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Bits per byte by domain, and their mean."""
    found = {domain: float(_bits(np.array(rows).sum(0))) for domain, rows in documents.items()}
    return {**found, "mean": sum(found.values()) / len(found)}


def against(ours: Documents, theirs: Documents, domain: str) -> Estimate:
    """How much lower our bits per byte are than theirs, in per cent, over the same resampled documents.

    `mean` is of the domains' figures; a resample draws the same numbers of documents in all of them.
    """
    if domain == "mean":
        return _mean_against(ours, theirs)
    values = np.hstack([np.array(ours[domain]), np.array(theirs[domain])])
    return bootstrap(lambda sums: 100 * (1 - _bits(sums[..., :3]) / _bits(sums[..., 3:])), values, seed=0)


def _mean_against(ours: Documents, theirs: Documents) -> Estimate:
    """As one table whose columns are a domain's sums: other domains' columns of a document are zero."""
    blocks = [np.hstack([np.array(ours[domain]), np.array(theirs[domain])]) for domain in ours]
    size = max(map(len, blocks))
    if {len(block) for block in blocks} != {size}:
        raise ValueError("domains of different numbers of documents")
    values = np.hstack(blocks)  # row i has document i of every domain: they are resampled together

    def lower(sums: np.ndarray) -> np.ndarray:
        columns = sums.reshape(*sums.shape[:-1], len(blocks), 6)
        mean = [_bits(columns[..., part]).mean(-1) for part in (slice(0, 3), slice(3, 6))]
        return np.asarray(100 * (1 - mean[0] / mean[1]))

    return bootstrap(lower, values, seed=0)


def lost(documents: Mapping[str, Documents], expert: str, merge: str, domain: str) -> float:
    """Which part of an expert's lead over the base on its domain a merge does not have, in per cent."""
    base, own, ours = (bits(documents[name])[domain] for name in ("base", expert, merge))
    return 100 * (ours - own) / (base - own)


def _bits(sums: np.ndarray) -> Any:
    return sums[..., 0] / sums[..., 2] / math.log(2)


def shown(found: Estimate) -> str:
    """A difference with its interval; a star where 0 lies outside."""
    if found.low is None or found.high is None:
        return f"{found.value:+.2f} %"
    star = "*" if found.low > 0 or found.high < 0 else ""
    return f"{found.value:+.2f} % ({found.low:+.2f} to {found.high:+.2f}){star}"
