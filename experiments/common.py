"""What the experiments share: the demo's models, what they are tuned on, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moerge.demonstration.progress import counting
from moerge.demonstration.text import DOMAINS, Corpus, write_corpora
from moerge.demonstration.train import TRAININGS, WINDOW, total_steps, train_models

BATCH = 8
"""Sequences of a step."""


def train_demo(
    corpora: Mapping[str, Corpus],
    folder: Path,
    seed: int,
    scale: float,
    say: Callable[[str, float], str] = lambda name, loss: name,
) -> None:
    """The demo's text, base and experts in `folder`, unless it holds them; `say` is what progress shows of a step."""
    if (folder / "trained").exists():
        return
    write_corpora(dict(corpora), folder / "text")
    with counting(total_steps(scale)) as advance:
        train_models(corpora, folder / "models", seed=seed, scale=scale, on_step=lambda name, loss: advance(say(name, loss)))
    (folder / "trained").touch()


def domain_weights() -> dict[str, float]:
    """What the base and all experts together were trained on, as the paper tunes (its table 5)."""
    return {domain: statistics.fmean(training.mixture.get(domain, 0.0) for training in TRAININGS.values()) for domain in DOMAINS}


def tuning_settings(model: Path, folder: Path, tokens: int, seed: int, learning_rate: float) -> dict[str, Any]:
    """How the experiments tune: all parameters, cross-entropy alone, on what `train_demo` has left in `folder`."""
    steps = max(1, round(tokens / (BATCH * WINDOW)))
    data = {
        domain: {"path": str(folder / "text" / domain / "train.jsonl"), "weight": weight}
        for domain, weight in domain_weights().items()
    }
    return {
        "model": str(model),
        "data": data,
        "steps": steps,
        "batch": BATCH,
        "length": WINDOW,
        "seed": seed,
        "learning_rate": learning_rate,
        "warmup": min(20, steps // 10),
        "save_every": steps,
        "save_dtype": "float32",
    }


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, all columns but the first to the right."""
    ruler = "|".join(["---", *("---:" for _ in header[1:])])
    return [f"| {' | '.join(header)} |", f"|{ruler}|", *(f"| {' | '.join(row)} |" for row in rows)]
