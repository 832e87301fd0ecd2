"""Fisher merging and RegMean of experts that were trained: better than their average on held-out text of every expert."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from moerge.demonstration.evaluate import perplexities
from moerge.demonstration.text import Corpus
from tests.helpers import tiny
from tests.helpers.command import moerge

pytestmark = pytest.mark.slow

EXPERTS = ("math", "code", "knowledge")


@pytest.fixture(scope="module")
def folder(trained: dict[str, Path], corpora: dict[str, Corpus], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside texts of each expert, and statistics of 30 of them."""
    found = tmp_path_factory.mktemp("statistics")
    for expert in EXPERTS:
        lines = [json.dumps({"text": document}) for document in corpora[expert].train]
        (found / f"{expert}.jsonl").write_text("\n".join(lines))
    assert (
        moerge(
            "stats", recipe(found, trained, "average"), found / "stats", *["--kind", "all", "--texts", "30", "--tokens", "128"]
        ).code
        == 0
    )
    return found


def recipe(folder: Path, trained: dict[str, Path], method: str) -> Path:
    merge = {"method": method} | ({"statistics": "stats"} if method in ("fisher", "regmean") else {})
    calibration = {expert: f"{expert}.jsonl" for expert in EXPERTS}
    experts = {expert: str(trained[expert]) for expert in EXPERTS}
    return tiny.write_recipe(folder, f"{method}.yaml", base=None, experts=experts, merge=merge, calibration=calibration)


def losses(folder: Path, trained: dict[str, Path], corpora: dict[str, Corpus], method: str) -> dict[str, float]:
    """Nats per token of held-out text of each expert."""
    out = folder / f"out-{method}"
    if not out.exists():
        assert moerge("merge", recipe(folder, trained, method), out).code == 0
    found = perplexities(out, {expert: corpora[expert] for expert in EXPERTS})
    return {expert: math.log(value) for expert, value in found.items()}


@pytest.mark.parametrize(("method", "gain"), [("fisher", 0.05), ("regmean", 0.1)])
def test_they_predict_held_out_text_better_than_the_average(
    method: str, gain: float, folder: Path, trained: dict[str, Path], corpora: dict[str, Corpus]
) -> None:
    average, merged = (losses(folder, trained, corpora, name) for name in ("average", method))
    assert sum(merged.values()) / 3 < sum(average.values()) / 3 - gain, (average, merged)
    assert all(merged[expert] < average[expert] for expert in EXPERTS), (average, merged)
