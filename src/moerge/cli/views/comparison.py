"""Print results of `moerge compare`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moerge.cli.console import Table, as_percent, print_json, print_warnings, say, show_table
from moerge.comparison.flow import Comparison
from moerge.comparison.verdict import Verdict
from moerge.figures import available, short
from moerge.formatting import as_count

_COLOURS = {"merge": "green", "merge with care": "yellow", "keep separate": "red"}


def comparison(found: Comparison, written: Sequence[Path], *, quiet: bool, as_json: bool) -> None:
    """Print the verdict on each role, the reasons, and the advice."""
    if as_json:
        print_json(found.to_json())
        return
    print_warnings(found.warnings)
    anchored = found.similarity.anchored
    what = "task vectors" if anchored else "parameters (the recipe has no base, so there are no task vectors)"
    if not quiet:
        say((found.source, "bold"), f": {what} of {', '.join(found.similarity.experts)}")
        show_table(_table(found.verdicts, anchored))
        say(_legend(found))
    for verdict in found.verdicts:
        say((f"{verdict.role}: {verdict.answer}", _COLOURS[verdict.answer]), f". {verdict.reason}")
    say(("advice:", "bold"), f" {found.advice}")
    if found.unheeded:
        say(f"this recipe merges {', '.join(found.unheeded)}, against the verdict")
    if written and not quiet:
        drawn = "" if available() else " (no figures: pip install 'moerge[figures]')"
        say(f"written: {', '.join(path.name for path in written)} in {written[0].parent}{drawn}")


def _table(verdicts: Sequence[Verdict], anchored: bool) -> Table:
    drift = ["drift"] if anchored else []
    table = Table("role", "size", "cosine", "least", "opposite", *drift, "distance", "verdict")
    for column in table.columns[1:-1]:
        column.justify = "right"
    for verdict in verdicts:
        drifted = [_number(verdict.drift)] if anchored else []
        cosines = (_number(verdict.cosine), _number(verdict.least_cosine))
        signs = as_percent(verdict.sign_conflict)
        size = as_count(verdict.parameters)
        table.add_row(verdict.role, size, *cosines, signs, *drifted, _number(verdict.distance), verdict.answer)
    return table


def _legend(found: Comparison) -> str:
    pairs = "cosine over pairs of experts, its mean and the least; opposite: share of opposite signs, its mean"
    distance = "distance of two experts over their norm, the largest (1.41: unrelated)"
    if not found.similarity.anchored:
        return f"{pairs}; {distance}"
    return f"{pairs}, of parameters that both changed; drift: norm of the task vector over the base's, the largest; {distance}"


def _number(value: float | None) -> str:
    return "" if value is None else short(value)
