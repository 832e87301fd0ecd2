"""Files of every kind that moerge reads, tiny and intact, made once and copied for each case."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml

import moerge
from moerge.progress import Advance, Progress, Unit
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import moerge as command
from tests.helpers.tiny import make_models, write_json, write_recipe

UP = "model.layers.0.mlp.up_proj.weight"
TEXT = "w3 w4 w5 w6 w7 w8 w9\n\nw10 w11 w12 w13 w14 w15\n"


def make_world(folder: Path) -> None:
    """Models with an adapter, recipes of several kinds, and what each command that writes something has written."""
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder, experts=["math", "code"], shards=1)
    make_models(folder / "sharded", experts=["math"], base=False, shards=2)
    write_adapter(folder / "lora", low_rank("model.layers.0.mlp.up_proj", (24, 16), rank=4), r=4, lora_alpha=8)
    (folder / "text.txt").write_text(TEXT)
    experts = {"math": "math", "code": {"model": "code", "weight": 2.0}}
    texts = {"math": "text.txt", "code": "text.txt", "base": "text.txt"}
    overrides = [
        {"match": "layers.0-1.attention", "method": "average"},
        {"match": "*norm*", "method": "linear", "weights": {"math": 1}},
    ]
    ties = {"method": "ties", "density": 0.8, "scale": 0.5, "seed": 1, "overrides": overrides}
    write_recipe(folder, experts=experts, merge=ties, dtype="float32", tokenizer="base")
    write_recipe(
        folder,
        "moe.yaml",
        experts=experts,
        merge={"method": "linear"},
        moe={"top_k": 2, "router": {"kind": "random"}, "include_base": True},
    )
    routed = {"format": "moerge", "router": {"kind": "perplexity"}, "mix": "layer", "top_k": 1}
    write_recipe(folder, "routed.yaml", experts=experts, merge={"method": "linear"}, moe=routed)
    write_recipe(folder, "lora.yaml", experts={"math": "math", "lora": "lora"}, merge={"method": "task_arithmetic"})
    write_recipe(
        folder, "sharded.yaml", experts={"math": "sharded/math", "code": "code"}, merge={"method": "slerp", "t": 0.3}, base=None
    )
    write_recipe(folder, "fisher.yaml", experts=experts, merge={"method": "fisher", "statistics": "stats"}, calibration=texts)
    regmean = {"method": "regmean", "statistics": "stats"}
    write_recipe(folder, "regmean.yaml", experts=experts, merge=regmean, calibration=texts)
    write_recipe(folder, "learned.yaml", experts=["math", "code"], merge={"method": "coefficients", "file": "k.json"})
    write_json(folder / "k.json", coefficients())
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(mergekit(), sort_keys=False))
    (folder / "slices.yaml").write_text(yaml.safe_dump(slices(), sort_keys=False))
    (folder / "tune.yaml").write_text(yaml.safe_dump(tuning(), sort_keys=False))
    moerge.merge(folder / "recipe.yaml", folder / "merged", threads=1)
    moerge.merge(folder / "moe.yaml", folder / "mixed", threads=1)
    moerge.merge(folder / "routed.yaml", folder / "routed", threads=1)
    done("stats", folder / "fisher.yaml", folder / "stats", "--kind", "all", "--texts", 2)
    interrupt(folder)
    results = folder / "results"
    done("compare", folder / "recipe.yaml", "--out", results / "compare")
    done("route", folder / "routed", "--text", f"math={folder / 'text.txt'}", "--out", results / "route")
    done("eval", folder / "merged", folder / "base", "--perplexity", f"a={folder / 'text.txt'}", "--out", results / "eval")
    moerge.merge(folder / "learned.yaml", results / "learned", threads=1)


def done(*arguments: Any) -> None:
    result = command(*arguments)
    assert result.code == 0, result


class Stopped(Progress):
    """Breaks off a merge after some of its steps."""

    steps = 0

    def phase(self, name: str, total: int, unit: Unit = "bytes") -> Advance:
        return self.advance

    def advance(self, amount: int) -> None:
        self.steps += 1
        if self.steps > 12:
            raise KeyboardInterrupt


def interrupt(folder: Path) -> None:
    """A merge into `folder/stopped` that was broken off."""

    with contextlib.suppress(KeyboardInterrupt):
        moerge.merge(folder / "recipe.yaml", folder / "stopped", threads=1, progress=Stopped())
    assert json.loads((folder / ".stopped.moerge-partial" / "journal.jsonl").read_text().splitlines()[0])


def coefficients() -> dict[str, Any]:
    rows = {UP: [[0.1] * 5, [0.2] * 5], "model.norm.weight": [[0.3], [0.4]]}
    directions = {"method": "task_arithmetic"}
    whole = {"format": 1, "experts": ["math", "code"], "directions": directions, "fixed": 0.3, "coefficients": rows}
    return {**whole, "chunk_sizes": {UP: 77}, "learning": {}}


def mergekit() -> dict[str, Any]:
    gradient = {"weight": [0.1, 0.5, 0.9], "density": [{"filter": "mlp", "value": 0.5}, {"value": 0.7}]}
    models = [{"model": "math", "parameters": gradient}, {"model": "code", "parameters": {"weight": 0.3}}]
    whole = {"merge_method": "dare_ties", "base_model": "base", "models": models, "dtype": "bfloat16"}
    return {**whole, "parameters": {"normalize": True, "int8_mask": True}, "tokenizer_source": "base"}


def slices() -> dict[str, Any]:
    one, two = {"model": "math", "layer_range": [0, 2]}, {"model": "code", "layer_range": [0, 1]}
    return {"merge_method": "passthrough", "slices": [{"sources": [one]}, {"sources": [two]}], "dtype": "float32"}


def tuning() -> dict[str, Any]:
    data = {"math": {"path": "text.txt", "weight": 2}, "code": "text.txt"}
    whole = {"model": "mixed", "data": data, "train": ["router"], "learning_rate": 1e-3, "batch": 2, "length": 4, "steps": 2}
    return {**whole, "losses": {"cross_entropy": 1.0}, "heldout": {"a": "text.txt"}, "device": "cpu", "seed": 3}
