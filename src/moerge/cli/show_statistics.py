"""What became of each expert's statistics."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moerge.cli.console import as_count, as_size, as_time, print_json
from moerge.statistics.gather import Forecast, Outcome


def forecast(found: Forecast, *, quiet: bool) -> None:
    """Say on standard error what a run will take."""
    if not quiet:
        passes = "one pass" if found.passes == 1 else f"{found.passes} passes"
        memory = as_size(found.memory_bytes)
        print(f"{found.expert}: {passes} over {found.tokens:,} tokens, {memory} for the model and sums", file=sys.stderr)


def outcomes(found: Iterable[Outcome], out: Path, *, quiet: bool, as_json: bool) -> None:
    """Print what was gathered or added up, one expert after another as they finish."""
    listed = {}
    for outcome in found:
        listed[outcome.facts.expert] = outcome.to_json()
        if not quiet and not as_json:
            Console().print(_line(outcome), highlight=False)
    if as_json:
        print_json({"folder": str(out), "experts": listed})


def _line(outcome: Outcome) -> str:
    facts = outcome.facts
    held = [f"Fisher information of {len(facts.fisher)} tensors"] if facts.fisher else []
    held += [f"Gram matrices of {len(facts.grams)} layers"] if facts.grams else []
    done = f"in {as_time(outcome.seconds)}" if outcome.gathered else "were there already"
    return (
        f"{escape(str(outcome.file))}: {' and '.join(held) or 'nothing'} over {facts.sequences:,} texts, "
        f"{as_count(facts.tokens)} tokens, {as_size(outcome.nbytes)}, {done}"
    )
