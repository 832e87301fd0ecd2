"""A folder with one of everything that a report shows: small real merges and comparisons, and results as the commands write them.

folder = make_results(tmp_path)     # merged/dense, merged/routed, compare, route, routing, eval, learned, tuned, results.json
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerge.checkpoint.manifest import read_manifest, to_json, weights_digest
from moerge.comparison import compare
from moerge.demonstration.result import DemoResult, demo_model
from moerge.evaluation.result import Difference, Evaluation, Measure, Score
from moerge.inference.result import Routes, TextRoute, routes_of
from moerge.merging.pipeline import merge
from moerge.recipe.coefficients import Coefficients
from tests.helpers.tiny import make_models, write_recipe

WRITTEN = 1_795_000_000
"""The time that all files get: 2026-11-18."""
EXPERTS = ("base", "math", "code")


def make_results(folder: Path) -> Path:
    """The folder, with times that do not depend on when this runs."""
    models = folder / "models"
    make_models(models, experts=("math", "code"))
    recipe = write_recipe(models, experts=("math", "code"), merge={"method": "ties", "density": 0.5})
    merge(recipe, folder / "merged" / "dense", threads=1)
    routed = write_recipe(models, "moe.yaml", experts=("math", "code"), merge={"method": "ties"}, moe={})
    merge(routed, folder / "merged" / "routed", threads=1)
    compared = compare(recipe, threads=1).model_copy(update={"recipe": "recipe.yaml", "models": {name: name for name in EXPERTS}})
    write(folder / "compare" / "compare.json", compared.to_json())
    write(folder / "route" / "route.json", token_routes(digest(folder / "merged" / "routed")).to_json())
    write(folder / "routing" / "route.json", sequence_routes().to_json())
    write(folder / "eval" / "results.json", evaluation(folder).to_json())
    coefficients(folder / "learned" / "coefficients.json")
    write_tuning(folder / "tuned")
    write(folder / "results.json", demo().to_json())
    for path in folder.rglob("*"):
        os.utime(path, (WRITTEN, WRITTEN))
    return folder


def write(path: Path, value: Mapping[str, Any]) -> Path:
    """A JSON file as the commands write it, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(to_json(value))
    return path


def digest(folder: Path) -> str:
    """That of a merged checkpoint's tensors."""
    manifest = read_manifest(folder)
    assert manifest is not None
    return weights_digest(manifest)


def token_routes(digest: str | None = None) -> Routes:
    """A token-routed model on two texts, one of which has an expert of its name."""
    layers = tuple(shares(*alpha) for alpha in ((0.2, 0.7, 0.1), (0.3, 0.5, 0.2)))
    oracle = {"oracle_accuracy": 0.75, "best": shares(0.25, 0.75, 0.0), "loss": shares(2.0, 1.5, 2.5)}
    math = text(8, (0.25, 0.6, 0.15), (0.2, 0.7, 0.1), 0.9, 0.7, layers=layers, **oracle)
    poems = text(1200, (0.5, 0.25, 0.25), (0.6, 0.2, 0.2), 1.04, None, layers=layers[::-1], **oracle)
    return routes_of("merged/routed", "token", EXPERTS, {"math": math, "poems": poems}, digest=digest)


def shares(*values: float) -> dict[str, float]:
    """A value for each expert."""
    return dict(zip(EXPERTS, values, strict=True))


def text(documents: int, alpha: Any, first: Any, entropy: float, accuracy: float | None, **more: Any) -> TextRoute:
    """The routing of a text."""
    by_expert = {"alpha": shares(*alpha), "first": shares(*first)}
    return TextRoute(documents=documents, **by_expert, entropy=entropy, accuracy=accuracy, **more)


def sequence_routes() -> Routes:
    """A sequence-routed model on one text, without an oracle."""
    math = text(8, (0.0, 1.0, 0.0), (0.0, 1.0, 0.0), 0.0, 1.0)
    return routes_of("merged/by-sequence", "sequence", EXPERTS, {"math": math}, warnings=("text 'math' was seen before",))


def score(checkpoint: str, kind: Any, on: str, metric: str, *figures: Any, **more: Any) -> Any:
    """A score, or with `against` a difference."""
    names = ("value", "standard_error", "low", "high", "documents")
    about = {"checkpoint": checkpoint, "kind": kind, "on": on, "metric": metric}
    return (Difference if more else Score)(**about, **dict(zip(names, figures, strict=True)), **more)


def measure(checkpoint: str, kind: Any, on: str, fingerprint: str, seconds: float, **more: Any) -> Measure:
    """A measure of a fixed time."""
    about = {"checkpoint": checkpoint, "kind": kind, "on": on, "fingerprint": fingerprint, "seconds": seconds}
    return Measure(**about, started="2026-11-18T12:00:00+00:00", **more)


def evaluation(folder: Path) -> Evaluation:
    """Two checkpoints on a benchmark and a text; the second is merged/dense."""
    names = ("models/base", "merged/dense")
    digests = {"models/base": None, "merged/dense": digest(folder / "merged" / "dense")}
    measures = []
    for index, name in enumerate(names):
        exact = score(name, "benchmark", "gsm8k", "exact_match", 0.25 + 0.25 * index, 0.0685, 0.14, 0.64, 40)
        bits = score(name, "text", "math", "bits_per_byte", 1.5 - 0.2 * index, 0.04, 1.2, 1.6, 30)
        perplexity = score(name, "text", "math", "perplexity", 9.0 - index, 0.5, 7.5, 10.0, 30)
        measures.append(measure(name, "benchmark", "gsm8k", f"b{index}", 3.5, scores=(exact,)))
        measures.append(measure(name, "text", "math", f"t{index}", 1.25, scores=(perplexity, bits), warnings=("one is short",)))
    better = score("merged/dense", "text", "math", "nats_per_byte", -0.14, 0.02, -0.18, -0.1, 30, against="models/base")
    unclear = score("merged/dense", "benchmark", "gsm8k", "exact_match", 0.25, 0.13, -0.01, 0.5, 40, against="models/base")
    settings = {"limit": 40, "bootstrap": {"resamples": 2000, "seed": 0}}
    return Evaluation(
        checkpoints=names,
        digests=digests,
        settings=settings,
        versions={"moerge": "0.1.0", "torch": "2.13.0"},
        measures=tuple(measures),
        differences=(better, unclear),
    )


def coefficients(path: Path) -> None:
    """Of two layers, with the curve of one stage."""
    path.parent.mkdir(parents=True)
    rows = {f"model.layers.{layer}.mlp.up_proj.weight": ((0.1 * layer,), (0.4,)) for layer in (0, 1)}
    updates = [{"update": 0, "heldout": 2.0}, {"update": 1, "train": 1.9, "heldout": 1.5}]
    stage = {"best_update": 1, "stopped_early": False, "updates": updates}
    learning = {"settings": {"objective": "alignment"}, "stages": [stage]}
    Coefficients(("math", "code"), rows, {}, 0.3, {"method": "task_arithmetic"}, learning).write(path)


def write_tuning(folder: Path) -> None:
    """metrics.jsonl and tune.json of three steps."""
    facts = {"versions": {"moerge": "0.1.0"}, "settings": {"batch": 2}, "sources": {}, "models": {}, "seconds": 61.0}
    write(folder / "tune.json", facts)
    rows = [{"step": n, "loss": 3 / n, "learning_rate": 0.1, "load": [[0.5, 0.5], [0.25, 0.75]]} for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def demo() -> DemoResult:
    """Four models on two domains."""
    perplexities = {
        "models/base": (4.0, 9.0),
        "models/math": (2.0, 10.0),
        "merged/dense": (3.0, 8.0),
        "merged/routed": (3.5, 7.0),
    }
    kinds = ("base", "expert", "dense", "moe")
    rows = [
        demo_model(name, kind, dict(zip(("math", "code"), values, strict=True)))
        for (name, values), kind in zip(perplexities.items(), kinds, strict=True)
    ]
    return DemoResult(out=Path("out"), seed=0, models=tuple(rows), seconds={"training": 60.0})
