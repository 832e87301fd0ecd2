"""Figure 10 in small: held-out perplexity against tokens tuned, for merges of the demo's experts and for baselines.

    python experiments/tuning.py --seeds 0 1 2 --work DIR --results experiments/results/tuning.json

For each seed: train the demo's base and experts, merge them in every way, tune every result on the same sequences in the same
order, and measure perplexity on held-out text of every domain on the way. What is finished in --work is not made again.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import train_demo, tuning_settings
from rich.console import Console
from tuning_report import BTX, Curve, Report, show, write

import moerge
from moerge.demonstration.runtime import import_torch
from moerge.demonstration.text import DOMAINS, make_corpora
from moerge.tuning.metrics import read_metrics
from moerge.tuning.run import tune

EXPERTS = ("math", "code", "knowledge")
POINTS = 10
TIES, DARE = {"method": "ties", "density": 0.8, "scale": 0.3333}, {"method": "dare", "density": 0.8, "scale": 0.3333}
RANDOM, RIDGE = {"router": {"kind": "random"}}, {"router": {"kind": "ridge"}}
BY_SEQUENCE = {"format": "moerge", "separate": ["ffn", "attention"], "router": {"kind": "perplexity"}}
BALANCED = {"load_balance": 0.01}
BASELINE = "baseline"


@dataclass(frozen=True)
class Row:
    """One line of the figure: how it is merged, and how it is tuned. `moe` None is a dense merge, `merge` None the base.

    `copies` merges copies of the base, `without` leaves out a domain's text.
    """

    merge: Mapping[str, Any] | None
    moe: Mapping[str, Any] | None = None
    tuning: Mapping[str, Any] = field(default_factory=dict)
    distil: bool = False
    copies: bool = False
    experts: tuple[str, ...] = EXPERTS
    without: str | None = None
    group: str = "merge"


ROWS = {
    BTX: Row({"method": "average"}, RANDOM, {"losses": BALANCED}),
    "TIES": Row(TIES, RANDOM, {"losses": BALANCED}),
    "DARE": Row(DARE, RANDOM, {"losses": BALANCED}),
    "TIES, ridge": Row(TIES, RIDGE, {"losses": BALANCED}),
    "TIES, ridge, distilled": Row(TIES, RIDGE, {"losses": {**BALANCED, "distillation": {"weight": 1.0}}}, distil=True),
    "separate attention, PPL": Row(TIES, BY_SEQUENCE),
    "router only": Row({"method": "average"}, RANDOM, {"losses": BALANCED, "train": "router"}, group=BASELINE),
    "random routing": Row({"method": "average"}, RANDOM, {"train": "experts+backbone"}, group=BASELINE),
    "sparse upcycling": Row({"method": "average"}, RANDOM, {"losses": BALANCED}, copies=True, group=BASELINE),
    "dense: the base": Row(None, group=BASELINE),
    "dense: average": Row({"method": "average"}, group=BASELINE),
    "three experts": Row({"method": "average"}, RANDOM, {"losses": BALANCED}, experts=("code", "knowledge"), group=BASELINE),
    "three experts, no math text": Row(
        {"method": "average"}, RANDOM, {"losses": BALANCED}, experts=("code", "knowledge"), without="math", group=BASELINE
    ),
}


def main() -> None:
    """Run the seeds, print the table, write the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies text and the experts' training steps")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="the paper's 1e-5 is for a billion parameters")
    parser.add_argument("--heldout", type=int, default=40, help="sequences of each domain to measure on")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "tuning.json")
    options = parser.parse_args()
    import_torch()
    curves: dict[str, dict[int, Curve]] = {}
    settings = {key: value for key, value in vars(options).items() if key not in ("work", "results")}
    settings["groups"] = {name: row.group for name, row in ROWS.items()}
    for seed in options.seeds:
        folder = options.work.absolute() / f"seed-{seed}-scale-{options.scale:g}"
        train_demo(make_corpora(seed, scale=options.scale), folder, seed, options.scale)
        for name in options.rows:
            begun = time.perf_counter()
            curves.setdefault(name, {})[seed] = run(name, folder, seed, options)
            print(f"seed {seed}, {name}: {time.perf_counter() - begun:.0f} s", flush=True)
        found = Report(curves, {**settings, "seeds": list(next(iter(curves.values())))})
        write(found, options.results)
    show(found, Console(width=140))


def run(name: str, folder: Path, seed: int, options: argparse.Namespace) -> Curve:
    """The curve of one row; a merge and a tuning that are there are taken as they are."""
    row = ROWS[name]
    slug = "".join(letter if letter.isalnum() else "-" for letter in name)
    merged = folder / "models" / "base" if row.merge is None else folder / f"{slug}-merged"
    if not merged.exists():
        moerge.merge(recipe(row, folder, seed), merged)
    out = folder / f"{slug}-tuned-{options.tokens}-{options.learning_rate:g}"
    if not out.exists():
        tune(tuning(row, folder, merged, seed, options), out, resume=True)
    found = [(entry["tokens"], entry["heldout"]) for entry in read_metrics(out / "metrics.jsonl") if "heldout" in entry]
    return [(tokens, math.exp(statistics.fmean(nats.values()))) for tokens, nats in found]


def recipe(row: Row, folder: Path, seed: int) -> Mapping[str, Any]:
    """How a row is merged."""
    models = {name: str(folder / "models" / ("base" if row.copies else name)) for name in row.experts}
    texts = {"base": "general", **{name: name for name in row.experts}}
    ridge = row.moe is not None and row.moe["router"]["kind"] == "ridge"
    calibration = {name: str(folder / "text" / domain / "train.jsonl") for name, domain in texts.items()} if ridge else {}
    found = {"base": str(folder / "models" / "base"), "experts": models, "merge": {**(row.merge or {}), "seed": seed}}
    return {**found, **({"moe": dict(row.moe)} if row.moe else {}), **({"calibration": calibration} if ridge else {})}


def tuning(row: Row, folder: Path, merged: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """How a row is tuned: on what the base and all experts were trained on, as in the paper's table 5."""
    found = tuning_settings(merged, folder, options.tokens, seed, options.learning_rate)
    data = {domain: source for domain, source in found["data"].items() if domain != row.without}
    if row.distil:
        for domain, source in data.items():
            source["teacher"] = str(folder / "models" / ("base" if domain == "general" else domain))
    steps = found["steps"]
    return {
        **found,
        "data": data,
        "save_every": max(1, steps // 4),
        "heldout": {domain: str(folder / "text" / domain / "heldout.jsonl") for domain in DOMAINS},
        "heldout_sequences": options.heldout,
        "evaluate_every": max(1, steps // POINTS),
        **row.tuning,
    }


if __name__ == "__main__":
    main()
