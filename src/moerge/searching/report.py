"""report.md of a search, with figures where matplotlib is installed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge import figures
from moerge.figures import chart, new_figure
from moerge.files import atomic_write
from moerge.searching.result import Judged, SearchResult, Trial, shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_PANELS = 8


def write_report(result: SearchResult, folder: Path, name: str) -> None:
    """Write the report, and its figures as SVG and PNG beside it."""
    drawn: list[tuple[str, str]] = []
    if figures.available():
        for file, title, figure in _figures(result):
            figures.save(figure, folder, file, title, title)
            drawn.append((file, title))
    atomic_write(folder / name, "\n".join(_lines(result, drawn)).encode())


def _lines(result: SearchResult, drawn: Sequence[tuple[str, str]]) -> Iterator[str]:
    yield f"# Search of {result.recipe}"
    yield ""
    yield result.headline() + ("." if result.finished else "; interrupted.")
    yield ""
    yield "## The winner"
    yield ""
    yield from _table(("parameter", "value", "importance"), _parameters(result))
    if result.judged:
        yield "## On text that was not searched on"
        yield ""
        yield from _table(("merge", "metric", "text", "documents", "value", "difference (95%)"), map(_judged, result.judged))
    for file, title in drawn:
        yield f"![{title}]({file}.png)"
        yield ""
    if len(result.objectives) > 1:
        yield "## Pareto front"
        yield ""
        front = [trial for trial in result.trials if trial.number in result.pareto]
        yield from _table(("trial", *result.objectives, "point"), map(_row, front))
    yield "## All trials"
    yield ""
    yield from _table(("trial", *result.objectives, "point"), map(_row, result.trials))


def _table(heads: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |"
    yield ""


def _parameters(result: SearchResult) -> Iterator[tuple[str, str, str]]:
    for name, value in result.winner.point.items():
        share = result.importance.get(name)
        yield name, f"{value:.4g}" if isinstance(value, float) else str(value), "" if share is None else f"{100 * share:.0f}%"


def _judged(row: Judged) -> tuple[str, ...]:
    between = f" ({row.low:+.4f} to {row.high:+.4f})" if row.low is not None and row.high is not None else ""
    difference = "" if row.difference is None else f"{row.difference:+.4f}{between}"
    return row.name, row.metric, row.domain, str(row.documents), f"{row.value:.4f}", difference


def _row(trial: Trial) -> tuple[str, ...]:
    values = [f"{value:.5g}" for value in trial.values or ()] or [trial.reason or trial.state]
    return str(trial.number), *values, shown(trial.point)


def _figures(result: SearchResult) -> Iterator[tuple[str, str, Figure]]:
    complete = [trial for trial in result.trials if trial.values]
    if len(complete) > 1:
        yield "path", "The value of each trial, and the best so far", draw_path(result)
        yield "parameters", "The value of each trial by parameter", draw_parameters(result)
    if len(result.objectives) > 1 and len(complete) > 1:
        yield "pareto", "Trials by the first two objectives", draw_pareto(result)


@chart
def draw_path(result: SearchResult) -> Figure:
    """Each trial's value, and the best so far."""
    figure = new_figure(6.4, 3.2)
    axes = figure.add_subplot()
    complete = [(trial.number, trial.values[0]) for trial in result.trials if trial.values]
    numbers, values = [number for number, _ in complete], [value for _, value in complete]
    best = [min(values[: index + 1]) for index in range(len(values))]
    axes.plot(numbers, values, "o", color=figures.color(5), label="trial")
    axes.step(numbers, best, where="post", color=figures.color(0), label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(_label(result.objectives[0]))
    axes.legend()
    return figure


@chart
def draw_parameters(result: SearchResult) -> Figure:
    """The first objective by each of the most important parameters."""
    names = sorted(result.winner.point, key=lambda name: -result.importance.get(name, 0.0))[:_MOST_PANELS]
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure = new_figure(3.2 * across, 2.6 * down)
    for index, name in enumerate(names):
        axes = figure.add_subplot(down, across, index + 1)
        rows = [(trial.point[name], trial.values[0]) for trial in result.trials if trial.values]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _ in rows)
        axes.plot(
            [value if numeric else str(value) for value, _ in rows], [value for _, value in rows], "o", color=figures.color(0)
        )
        axes.set_xlabel(figures.shortened(name))
        axes.set_ylabel(_label(result.objectives[0]))
    return figure


@chart
def draw_pareto(result: SearchResult) -> Figure:
    """The first two objectives of each trial; the front has another colour."""
    figure = new_figure(5.2, 3.6)
    axes = figure.add_subplot()
    for on_front, label in ((False, "other"), (True, "Pareto front")):
        rows = [trial.values for trial in result.trials if trial.values and (trial.number in result.pareto) == on_front]
        axes.plot(
            [row[0] for row in rows],
            [row[1] for row in rows],
            "D" if on_front else "o",
            color=figures.color(on_front),
            label=label,
        )
    axes.set_xlabel(_label(result.objectives[0]))
    axes.set_ylabel(_label(result.objectives[1]))
    axes.legend()
    return figure


def _label(metric: str) -> str:
    return {"bits_per_byte": "bits per byte", "kl": "KL to the experts (nats per token)", "bytes": "bytes on disk"}[metric]
