"""Print results of `moerge stats`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moerge.cli.console import print_json, say
from moerge.formatting import as_count, as_size, as_time
from moerge.gather.gather import Outcome


def outcomes(found: Iterable[Outcome], out: Path, *, quiet: bool, as_json: bool) -> None:
    """Print what was gathered or added up, one expert after another as they finish."""
    listed = {}
    for outcome in found:
        listed[outcome.facts.expert] = outcome.to_json()
        if not quiet and not as_json:
            say(_line(outcome))
    if as_json:
        print_json({"folder": str(out), "experts": listed})


def _line(outcome: Outcome) -> str:
    facts = outcome.facts
    held = [f"Fisher information of {len(facts.fisher)} tensors"] if facts.fisher else []
    held += [f"Gram matrices of {len(facts.grams)} layers"] if facts.grams else []
    done = f"in {as_time(outcome.seconds)}" if outcome.gathered else "were there already"
    return (
        f"{outcome.file}: {' and '.join(held) or 'nothing'} over {facts.sequences:,} texts, "
        f"{as_count(facts.tokens)} tokens, {as_size(outcome.nbytes)}, {done}"
    )
