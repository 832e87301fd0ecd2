"""The papers' claims on a model that was really pretrained, step by step.

    python -m experiments.real --base PATH --corpus DIR --work DIR --budget cpu

PATH is the model's folder, DIR/DOMAIN/{train,valid}.jsonl.zst the text. What is finished in --work is not made again, so that the
same command goes on after an interruption. Results are written after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moerge.demonstration.runtime import import_models_extra

from . import tables, training
from .report import write
from .settings import BUDGETS, EXPERTS, MemoryBudget, Work
from .text import write_text

STEPS: dict[str, Callable[[Work, MemoryBudget, int, Callable[[dict[str, Any]], None]], None]] = {"2": tables.run}
"""Steps with results, in the order in which they are run unless --steps says otherwise."""


def main() -> None:
    """Run the steps of every seed; the first seed's come first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the pretrained model's folder")
    parser.add_argument("--corpus", type=Path, required=True, help="text by domain")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the budget's")
    parser.add_argument("--steps", nargs="+", choices=["0", "1", *STEPS], default=["0", "1", *STEPS])
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "real")
    options = parser.parse_args()
    import_models_extra()
    budget, work = BUDGETS[options.budget], Work(options.work.absolute())
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.corpus, work, budget.seeds, budget.per_source)
    for seed in options.seeds or budget.seeds:
        for step in options.steps:
            begun = time.perf_counter()
            if step == "0":
                training.heal(options.base, work, budget)
            elif step == "1":
                for domain in EXPERTS:
                    training.train_expert(work, budget, seed, domain)
            else:
                path = options.results / f"step-{step}-seed-{seed}.json"
                STEPS[step](work, budget, seed, lambda found, path=path: _save(path, found, budget))
                write(options.results)
            print(f"seed {seed}, step {step}: {time.perf_counter() - begun:.0f} s", flush=True)


def _save(path: Path, found: dict[str, Any], budget: MemoryBudget) -> None:
    content = {"budget": dataclasses.asdict(budget), **found}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
