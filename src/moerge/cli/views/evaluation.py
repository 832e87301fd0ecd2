"""Print results of `moerge eval`."""

from __future__ import annotations

import sys

from moerge.cli.console import Table, print_warnings, say, show_table, view
from moerge.evaluation import sandbox
from moerge.evaluation.result import Difference, Evaluation, Score
from moerge.formatting import short_names


@view
def evaluation(found: Evaluation) -> None:
    """Print a table of the benchmarks, one of the texts, and the differences."""
    _benchmarks(found)
    _texts(found)
    _differences(found)


def wall(*, quiet: bool) -> None:
    """Say on standard error what is around generated code."""
    if sandbox.wall() != "bubblewrap":
        print_warnings([sandbox.describe_wall()])
    elif not quiet:
        print(sandbox.describe_wall(), file=sys.stderr)


def _benchmarks(found: Evaluation) -> None:
    scores = [score for score in found.scores if score.kind == "benchmark"]
    if not scores:
        return
    tasks = list(dict.fromkeys(score.on for score in scores))
    table = Table("checkpoint", *tasks, *(["mean"] if len(tasks) > 1 else []))
    _to_the_right(table)
    for name, short in short_names(found.checkpoints).items():
        own = [score for score in scores if score.checkpoint == name]
        mean = [f"{100 * sum(score.value for score in own) / len(own):.1f}"] if len(tasks) > 1 else []
        table.add_row(short, *map(_share, own), *mean)
    show_table(table)
    counts = {score.on: score.documents for score in scores}
    listed = ", ".join(f"{task} {count:,}" for task, count in counts.items())
    say(f"right answers in %, ± standard error; questions: {listed}")


def _texts(found: Evaluation) -> None:
    scores = [score for score in found.scores if score.kind == "text"]
    if not scores:
        return
    domains = list(dict.fromkeys(score.on for score in scores))
    for metric, title, digits in (("perplexity", "perplexity", 2), ("bits_per_byte", "bits per byte", 4)):
        table = Table(title, *domains)
        _to_the_right(table)
        for name, short in short_names(found.checkpoints).items():
            own = [score for score in scores if score.checkpoint == name and score.metric == metric]
            table.add_row(short, *(_with_error(score.value, score.standard_error, 1, digits) for score in own))
        show_table(table)
    counts = {score.on: score.documents for score in scores}
    listed = ", ".join(f"{domain} {count:,}" for domain, count in counts.items())
    say(f"± standard error (bootstrap over documents); documents: {listed}")


def _differences(found: Evaluation) -> None:
    if not found.differences:
        return
    names = short_names(found.checkpoints)
    keys = list(dict.fromkeys((row.kind, row.on) for row in found.differences))
    table = Table(f"less {names[found.checkpoints[0]]}", *(on for _, on in keys))
    _to_the_right(table)
    for name in found.checkpoints[1:]:
        own = {(row.kind, row.on): row for row in found.differences if row.checkpoint == name}
        table.add_row(names[name], *(_interval(own[key]) for key in keys))
    show_table(table)
    said = {"benchmark": "right answers in points of %", "text": "nats per byte"}
    kinds = " and ".join(said[kind] for kind in dict.fromkeys(kind for kind, _ in keys))
    say(f"paired differences, {kinds}, with 95% intervals (* : without 0)")


def _interval(row: Difference) -> str:
    scale, digits = (100, 1) if row.kind == "benchmark" else (1, 4)
    if row.low is None or row.high is None:
        return f"{scale * row.value:+.{digits}f}"
    clear = "*" if row.low > 0 or row.high < 0 else ""
    return f"{scale * row.value:+.{digits}f} ({scale * row.low:+.{digits}f} to {scale * row.high:+.{digits}f}){clear}"


def _share(score: Score) -> str:
    if score.standard_error == 0 and score.low is not None and score.high is not None:  # all the same: an error of 0 says nothing
        return f"{100 * score.value:.1f} ({100 * score.low:.1f} to {100 * score.high:.1f})"
    return _with_error(100 * score.value, score.standard_error, 100, 1)


def _with_error(value: float, error: float | None, scale: float, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {scale * error:.{digits}f}")


def _to_the_right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
