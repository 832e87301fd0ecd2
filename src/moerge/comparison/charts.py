"""The pictures of a comparison: cosines and sign conflicts by layer and part, pairs of experts by layer, drift, TIES' losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moerge import figures
from moerge.comparison.similarity import Pair, Similarity
from moerge.figures import Scale, around, chart, heatmap, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = Callable[[Pair], float | None]
_SHARES = ("survives", "outvoted", "trimmed")


@dataclass(frozen=True)
class Chart:
    """A picture that can be drawn: its title, and a description for those who do not see it."""

    title: str
    description: str
    draw: Callable[[], Figure]


def charts(found: Similarity) -> dict[str, Chart]:
    """All pictures that a comparison has, by the name of their files."""
    what = "task vectors" if found.anchored else "parameters"
    pairs, layered = _pair_count(found), any(pair.region.layer is not None for pair in found.pairs)
    size = max((row.parameters for row in found.rows_of("model")), default=0)
    over = f"mean over {pairs} pairs of experts" if pairs > 1 else "one pair of experts"
    over += f", {size / 1e6:,.3g} million parameters each"
    made: dict[str, Chart] = {}
    if layered:
        title = f"Cosine similarity of {what}, {over}"
        made["cosine"] = _grid(found, title, "cosine similarity", lambda pair: pair.cosine, 0.0)
        among = "parameters that both changed" if found.anchored else "parameters"
        title = f"Share of opposite signs among {among}, {over}"
        made["conflict"] = _grid(found, title, "opposite signs, share", lambda pair: pair.sign_conflict_changed, 0.5)
        title = f"Cosine similarity of {what} by layer, each pair of experts"
        made["pairs"] = Chart(title, _described(title, found), partial(draw_pairs, found))
    if layered and found.anchored:
        title = "Norm of the task vector relative to the base, by layer and expert"
        made["drift"] = Chart(title, _described(title, found), partial(draw_drift, found))
    if found.anchored:
        title = f"What TIES keeps of each task vector at density {'/'.join(f'{density:g}' for density in found.densities)}"
        made["ties"] = Chart(title, _described(title, found), partial(draw_ties, found, title))
    return made


def _grid(found: Similarity, title: str, label: str, value: Value, centre: float) -> Chart:
    conflict = centre != 0
    values = [value(pair) for pair in found.pairs_of("part") if not _is_norm(pair.region.role)]
    low, high = around(centre, values, least=0.05, most=max(centre, 1 - centre))
    scale = Scale(label, figures.GOOD_IS_LOW if conflict else figures.GOOD_IS_HIGH, low, high)
    return Chart(title, _described(title, found), partial(draw_grid, found, title, value, scale))


def _described(title: str, found: Similarity) -> str:
    by_role = []
    for role in found.roles:
        cosines = [pair.cosine for pair in found.pairs_of("role", role)]
        by_role.append(f"{role} {_number(_mean(cosines))}")
    return f"{title}. Experts: {', '.join(found.experts)}. Mean cosine over all layers: {', '.join(by_role)}."


@chart
def draw_grid(found: Similarity, title: str, value: Value, scale: Scale) -> Figure:
    """Layers down, parts across, the mean over pairs as colour; parts outside of layers stand below in words."""
    rows = found.pairs_of("part")
    layers = sorted({pair.region.layer for pair in rows if pair.region.layer is not None})
    parts = list(dict.fromkeys(pair.region.role for pair in rows if pair.region.layer is not None))
    parts.sort(key=_is_norm)  # last: they are few numbers, and often alike where nothing else is
    cells: dict[tuple[int | None, str], list[float | None]] = {}
    for pair in rows:
        cells.setdefault((pair.region.layer, pair.region.role), []).append(value(pair))
    grid_RC = [[_mean(cells.get((layer, part), [])) for part in parts] for layer in layers]
    numbered = len(layers) * len(parts) <= figures.MOST_CELLS_WITH_NUMBERS
    width, height = (0.46, 0.27) if numbered else (0.32, 0.15)
    figure = new_figure(max(4.6, 1.9 + width * len(parts)), max(3.0, 2.0 + height * len(layers)))
    axes = figure.subplots()
    mesh = heatmap(axes, grid_RC, [str(layer) for layer in layers], parts, scale)
    outside = [f"{part} {_number(_mean(values))}" for (layer, part), values in cells.items() if layer is None]
    axes.set(ylabel="layer", xlabel="\n".join(["part of the layer", *_wrapped(outside, len(parts))]))
    shown = [cell for row in grid_RC for cell in row if cell is not None]
    extend = _extended(shown, scale)
    figure.colorbar(mesh, ax=axes, label=scale.label, extend=extend)
    figure.suptitle(title.replace(", ", ",\n", 1), fontsize=9)
    return figure


def _extended(values: Sequence[float], scale: Scale) -> str:
    """At which ends a colour bar is pointed, because values lie beyond."""
    low, high = min(values, default=scale.low) < scale.low, max(values, default=scale.high) > scale.high
    return "both" if low and high else "min" if low else "max" if high else "neither"


def _is_norm(part: str) -> bool:
    return part.split(".")[0] == "norm" or "norm" in part.split(".")[-1]


def _wrapped(outside: Sequence[str], parts: int) -> list[str]:
    """Wrap the tensors outside of layers, a few a line."""
    per_line = max(2, parts // 3)
    return [
        ("outside: " if not start else "") + ", ".join(outside[start : start + per_line])
        for start in range(0, len(outside), per_line)
    ]


@chart
def draw_pairs(found: Similarity) -> Figure:
    """MergeME's figure 4, a panel for each pair of experts: layers across, the cosine of each role's tensors in a layer."""
    pairs = list(dict.fromkeys((pair.a, pair.b) for pair in found.pairs_of("layer")))
    roles = _roles_in_layers(found)
    figure, panels = _panels(len(pairs), "cosine similarity")
    for axes, (a, b) in zip(panels, pairs, strict=True):
        for index, role in enumerate(roles):
            rows = [pair for pair in found.pairs_of("layer", role) if (pair.a, pair.b) == (a, b)]
            _line(axes, index, role, [(pair.region.layer, pair.cosine) for pair in rows])
        axes.set_title(f"{a} and {b}")
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    _finish(figure, panels, roles)
    return figure


@chart
def draw_drift(found: Similarity) -> Figure:
    """A panel for each role: layers across, the norm of each expert's task vector over that of the base."""
    roles = _roles_in_layers(found)
    figure, panels = _panels(len(roles), "norm of the task vector\n/ norm of the base")
    for axes, role in zip(panels, roles, strict=True):
        for index, expert in enumerate(found.experts):
            rows = [row for row in found.rows_of("layer", role) if row.expert == expert]
            _line(axes, index, expert, [(row.region.layer, row.relative_norm) for row in rows])
        axes.set_title(role)
    drifts = [row.relative_norm or 0.0 for role in roles for row in found.rows_of("layer", role)]
    panels[0].set_ylim(0, 1.05 * max(drifts, default=0.0) or 1.0)
    _finish(figure, panels, found.experts)
    return figure


@chart
def draw_ties(found: Similarity, title: str) -> Figure:
    """For each role and expert a bar: the shares of sum |tau| that survive, are outvoted and are trimmed."""
    rows = [row for role in found.roles for row in found.rows_of("role", role) if row.survives is not None]
    figure = new_figure(6.4, 1.5 + 0.2 * len(rows))
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for index, share in enumerate(_SHARES):
        widths = [100 * (getattr(row, share) or 0.0) for row in rows]
        axes.barh(
            range(len(rows)), widths, 0.8, left=left, color=figures.colour(index), label=share, edgecolor="white", linewidth=0.6
        )
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [f"{row.region.role}: {row.expert}" for row in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the task vector's sum of magnitudes, %")
    figure.suptitle(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panels(count: int, label: str) -> tuple[Figure, list[Any]]:
    """So many small axes with common scales, three or more in a row."""
    columns = min(count, max(3, math.ceil(math.sqrt(count))))
    rows = -(-count // columns)
    figure = new_figure(max(3.6, 1.0 + 2.1 * columns), 0.8 + 1.8 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat)
    for spare in panels[count:]:
        spare.remove()
    for axes in panels[:count]:
        axes.tick_params(labelbottom=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.supylabel(label, fontsize=9)
    figure.supxlabel("layer", fontsize=9)
    return figure, panels[:count]


def _line(axes: Any, index: int, label: str, points: Iterable[tuple[int | None, float | None]]) -> None:
    known = [(layer, value) for layer, value in points if layer is not None and value is not None]
    marker = figures.MARKERS[index % len(figures.MARKERS)]
    xs, ys = [layer for layer, _ in known], [value for _, value in known]
    style = figures.DASHES[index // len(figures.PALETTE) % len(figures.DASHES)]
    axes.plot(xs, ys, style, color=figures.colour(index), marker=marker, markersize=3, linewidth=1.2, label=label)


def _finish(figure: Figure, panels: Sequence[Any], labels: Sequence[str]) -> None:
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(labels), 5), frameon=False)


def _roles_in_layers(found: Similarity) -> list[str]:
    return list(dict.fromkeys(pair.region.role for pair in found.pairs_of("layer") if pair.region.layer is not None))


def _pair_count(found: Similarity) -> int:
    return len({(pair.a, pair.b) for pair in found.pairs})


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _number(value: float | None) -> str:
    return "none" if value is None else figures.short(value)
