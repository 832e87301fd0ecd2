"""Tiny mixtures with text, and settings to tune them with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import moerge as package
from moerge.tuning.metrics import read_metrics
from moerge.tuning.run import tune
from tests.helpers.command import moerge
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import EXPERTS, make_models, read_tensors, write_recipe

SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "batch": 4, "length": 16, "steps": 6, "device": "cpu"}


def write_texts(folder: Path, documents: int = 12) -> dict[str, str]:
    """A file of text for the base and each expert, each with words of its own."""
    found = {}
    for number, name in enumerate(("base", *EXPERTS)):
        words = [[f"w{3 + (number * 15 + (7 * i * j + j * j) % 17) % 60}" for j in range(20)] for i in range(documents)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(row)}) + "\n" for row in words))
        found[name] = f"{name}.jsonl"
    return found


def make_moe(folder: Path, *, by_sequence: bool = False, **moe: Any) -> Path:
    """`folder/moe`: the base and three experts in a Mixtral, or routed by sequence with a gate that learns."""
    make_models(folder, dtype="F32")
    if by_sequence:
        moe = {"format": "moerge", "router": {"kind": "learned"}, "include_base": False, **moe}
    package.merge(write_recipe(folder, moe={"top_k": 2, **moe}, merge={"method": "average"}), folder / "moe", threads=1)
    return folder / "moe"


def write_tuning(folder: Path, name: str = "tune.yaml", **changes: Any) -> Path:
    """TUNE.yaml for `make_moe`'s model; `changes` replace or add keys, None removes one."""
    texts = write_texts(folder)
    data = {name: {"path": path, "weight": weight} for (name, path), weight in zip(texts.items(), (5, 3, 1, 1), strict=True)}
    settings = {"model": "moe", "data": data, **SETTINGS, **changes}
    path = folder / name
    path.write_text(yaml.safe_dump({key: value for key, value in settings.items() if value is not None}, sort_keys=False))
    return path


def run(folder: Path, out: str, **changes: Any) -> dict[str, Any]:
    """Tune into `folder/out`; what tune.json and `--json` have."""
    result = tune(write_tuning(folder, f"{out}.yaml", **changes), folder / out)
    assert result is not None
    return result.to_json()


def refused(path: Path, out: Path | None = None) -> str:
    """What `moerge tune` says instead of tuning, or of a dry run, and that nothing is left."""
    result = moerge("tune", path, out or "--dry-run")
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1), result
    if out is not None:
        assert not out.exists() and not list(out.parent.glob(f".{out.name}.moerge-tuning"))
    return result.err


def stop_after(step: int, tokens: int = 64) -> Recorded:
    """Interrupts training after this step, as Ctrl-C does."""

    def stop(amount: int) -> None:
        if progress.done["tokens"] >= step * tokens:
            raise KeyboardInterrupt

    progress = Recorded(stop)
    return progress


def moved(before: Path, after: Path) -> set[str]:
    """Names of the tensors whose bytes differ between two checkpoints of the same tensors."""
    old, new = read_tensors(before), read_tensors(after)
    assert old.keys() == new.keys()
    return {name for name, value in new.items() if not np.array_equal(value, old[name])}


def rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a tuned checkpoint without what depends on the clock."""
    found = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in found]
