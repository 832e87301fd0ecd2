"""What experiments/tuning.py found: figure 10 as a table, Markdown, JSON and a picture, and its two questions answered."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import markdown, spread
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moerge import figures
from moerge.figures import chart, color, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BTX = "BTX: average"
SHOWN = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Points of the table, as fractions of all tokens; the nearest measured ones."""
Curve = list[tuple[int, float]]
"""Tokens tuned, and the geometric mean of the domains' perplexities."""


@dataclass(frozen=True)
class Report:
    """The curves of every row by seed, in the table's order."""

    curves: Mapping[str, Mapping[int, Curve]]
    settings: Mapping[str, Any]

    def points(self) -> list[int]:
        """Numbers of the points that the table shows."""
        tokens = [point for point, _ in next(iter(next(iter(self.curves.values())).values()))]
        return sorted({min(range(len(tokens)), key=lambda i: abs(tokens[i] - share * tokens[-1])) for share in SHOWN})

    def tokens(self, point: int) -> int:
        """Tokens tuned at a point."""
        return next(iter(next(iter(self.curves.values())).values()))[point][0]

    def saved(self, name: str, point: int) -> list[float | None]:
        """The fraction of tokens that a row does not need for what BTX has at a point, by seed; None: never reached."""
        found = []
        for seed, curve in self.curves[name].items():
            goal = self.curves[BTX][seed][point]
            needed = tokens_to_reach(curve, goal[1])
            found.append(None if needed is None else 1 - needed / goal[0])
        return found

    def ahead(self, name: str, point: int) -> list[float]:
        """By what fraction a row's perplexity is lower than the average's at a point, by seed."""
        return [1 - curve[point][1] / self.curves[BTX][seed][point][1] for seed, curve in self.curves[name].items()]

    def rows(self) -> list[list[str]]:
        """The table: perplexities at some points."""
        return [
            [
                name,
                str(len(curves)),
                *(spread([curve[point][1] for curve in curves.values()]) for point in self.points()),
            ]
            for name, curves in self.curves.items()
        ]

    def header(self) -> list[str]:
        """Its columns."""
        return ["row", "seeds", *(f"{self.tokens(point):,}" for point in self.points())]

    def savings(self) -> list[list[str]]:
        """Tokens saved on the way to what BTX has at some points."""
        points = self.points()[1:]
        return [[name, *(self._saving(name, point) for point in points)] for name in self.curves if name != BTX]

    def _saving(self, name: str, point: int) -> str:
        saved = self.saved(name, point)
        known = [100 * value for value in saved if value is not None]
        reached = "" if len(known) == len(saved) else f" ({len(known)} of {len(saved)} seeds)"
        return f"{spread(known, 0)} %{reached}" if known else "not reached"

    def against_average(self) -> list[list[str]]:
        """How much lower than the average's perplexity each row's is at some points, paired by seed."""
        return [
            [name, *(f"{spread([100 * v for v in self.ahead(name, point)], 1)} %" for point in self.points())]
            for name in self.curves
            if name != BTX
        ]


def tokens_to_reach(curve: Curve, perplexity: float) -> float | None:
    """Where a curve first is as low as this, on straight lines between its points."""
    for (tokens, value), (after, lower) in zip([curve[0], *curve], curve, strict=False):
        if lower <= perplexity:
            return after if value == lower else tokens + (after - tokens) * (value - perplexity) / (value - lower)
    return None


def show(report: Report, console: Console) -> None:
    """The tables on the terminal."""
    for header, rows in ((report.header(), report.rows()), (["tokens saved", *report.header()[3:]], report.savings())):
        table = Table(*header, box=SIMPLE_HEAD)
        for row in rows:
            table.add_row(*row)
        console.print(table)


def write(report: Report, path: Path) -> None:
    """JSON, Markdown and the picture, all named after `path`."""
    content = {"settings": report.settings, "curves": report.curves}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = [
        "Perplexity, the geometric mean over the domains' held-out text, by tokens tuned; mean ± standard deviation over seeds.",
        "",
        *markdown(report.header(), report.rows()),
        "",
        f"Tokens saved on the way to the perplexity that {BTX} has after so many; interpolated between the points measured:",
        "",
        *markdown(["row", *(f"{report.tokens(point):,}" for point in report.points()[1:])], report.savings()),
        "",
        f"How much lower the perplexity is than that of {BTX}, paired by seed; negative is higher:",
        "",
        *markdown(["row", *report.header()[2:]], report.against_average()),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if figures.available():
        title = "Perplexity against tokens of fine-tuning"
        figures.save(draw(report), path.parent, path.stem, title, f"{title}, one line for each way of merging.")


def read(path: Path) -> Report:
    """What `write` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    curves = {
        name: {int(seed): [(tokens, value) for tokens, value in curve] for seed, curve in by_seed.items()}
        for name, by_seed in content["curves"].items()
    }
    return Report(curves, content["settings"])


@chart
def draw(report: Report) -> Figure:
    """Merges on the left, baselines on the right, each side of the seeds that all its rows have; the band is their deviation."""
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = new_figure(9.0, 4.2)
    panels: Any = figure.subplots(1, 2, sharey=True)
    names = list(report.curves)
    merges = [name for name in names if report.settings.get("groups", {}).get(name) != "baseline"]
    for axes, group in zip(panels, (merges, [BTX, *(name for name in names if name not in merges)]), strict=True):
        seeds = set.intersection(*(set(report.curves[name]) for name in group))
        for index, name in enumerate(group):
            _line(axes, {seed: report.curves[name][seed] for seed in sorted(seeds)}, name, index)
        axes.set(xlabel="tokens tuned, thousands", yscale="log", title=f"seeds: {', '.join(map(str, sorted(seeds)))}")
        axes.yaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.legend(frameon=False, loc="upper right")
    panels[0].set_ylim(top=1.4 * panels[0].get_ylim()[1])  # room for the legends
    panels[0].set(ylabel="held-out perplexity, geometric mean over domains")
    return figure


def _line(axes: Any, by_seed: Mapping[int, Curve], name: str, index: int) -> None:
    tokens = [point / 1000 for point, _ in next(iter(by_seed.values()))]
    columns = list(zip(*([value for _, value in curve] for curve in by_seed.values()), strict=True))
    means = [statistics.fmean(column) for column in columns]
    style = {"marker": figures.MARKERS[index % 8], "linestyle": figures.DASHES[index % 4]}
    axes.plot(tokens, means, color=color(index), label=name, markersize=3, linewidth=1.2, **style)
    if len(by_seed) > 1:
        low, high = zip(
            *((m - statistics.stdev(c), m + statistics.stdev(c)) for m, c in zip(means, columns, strict=True)), strict=True
        )
        axes.fill_between(tokens, low, high, color=color(index), alpha=0.08, linewidth=0)
