"""The papers' claims on a model that was really pretrained, step by step.

    python -m experiments.real --base PATH --corpus CORPUS --bench BENCH --tokenizer DIR --work DIR --budget cpu

PATH is the model's folder or GGUF file, CORPUS/DOMAIN/{train,valid}.jsonl.zst the text, and BENCH what `moerge eval --data`
takes, with zstandard. What is finished in --work is not made again, so that the same command goes on after an interruption, and
results are written after every row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from moerge.demonstration.runtime import import_torch

from . import curves, learned, similarity, tables, training, whole
from .report import write
from .settings import BUDGETS, EXPERTS, Budget, Work
from .text import write_text

Step = Callable[[Work, Budget, int, Callable[[dict[str, Any]], None]], None]


def _steps(options: argparse.Namespace) -> dict[str, Step]:
    """Steps with results, in the order in which they are run unless --steps says otherwise."""
    return {
        "2": tables.run,
        "6": learned.run,
        "4": partial(similarity.run, bench=options.bench, results=options.results),
        "benchmarks": partial(tables.answers, bench=options.bench),
        "3": curves.run,
        "5": partial(whole.run, tokenizer=options.tokenizer),
    }


ORDER = ("0", "1", "2", "6", "4", "benchmarks", "3", "5")
"""Of all steps: the healed base, experts, and what is measured of them."""


def main() -> None:
    """Run the steps of every seed; the first seed's come first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="the pretrained model's folder, or a GGUF file")
    parser.add_argument("--corpus", type=Path, required=True, help="text by domain")
    parser.add_argument("--bench", type=Path, help="the benchmarks' files, for steps 4 and benchmarks")
    parser.add_argument("--tokenizer", type=Path, help="a folder with GPT-NeoX's tokenizer.json, for step 5")
    parser.add_argument("--work", type=Path, required=True, help="where models are kept")
    parser.add_argument("--budget", choices=BUDGETS, default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: the budget's")
    parser.add_argument("--steps", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "real")
    options = parser.parse_args()
    import_torch()
    steps, budget, work = _steps(options), BUDGETS[options.budget], Work(options.work.absolute())
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.corpus, work, budget.seeds, budget.per_source)
    for seed in options.seeds or budget.seeds:
        for step in options.steps:
            begun = time.perf_counter()
            if step == "0":
                training.heal(training.pretrained(options.base, work), work, budget)
            elif step == "1":
                for domain in EXPERTS:
                    training.train_expert(work, budget, seed, domain)
            else:
                path = options.results / f"step-{step}-seed-{seed}.json"
                steps[step](work, budget, seed, lambda found, path=path: _save(path, found, budget))
                write(options.results)
            print(f"seed {seed}, step {step}: {time.perf_counter() - begun:.0f} s", flush=True)


def _save(path: Path, found: dict[str, Any], budget: Budget) -> None:
    content = {"budget": dataclasses.asdict(budget), **found}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
