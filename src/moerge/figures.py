"""Figures: colours that colour-blind people can tell apart, vector and pixel files, and the same data beside them.

A chart is a function that returns a matplotlib `Figure`, decorated with `chart`; `save` writes it. The same data give the same
bytes with the same version of matplotlib. matplotlib (the extra `figures`) is imported when something is drawn.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec
from xml.etree import ElementTree

import numpy as np

from moerge.errors import InputError
from moerge.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's colours (2008)."""
MARKERS = "osD^vPX*"
"""For lines, so that they differ without colour."""
DASHES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "\\\\", "xx", "++", "--", "oo")
"""Dashes of lines and hatches of areas, for series beyond the palette: no two look the same."""
MISSING = "#dddddd"
"""The colour of cells without a value."""
GOOD_IS_HIGH, GOOD_IS_LOW = "RdBu", "RdBu_r"
"""Colour maps: red means conflict and blue agreement, whichever is larger."""
PIXELS_PER_INCH = 150
MOST_CELLS_WITH_NUMBERS = 160
"""In a larger heatmap numbers would be too small to read."""

MOST_MARKERS = 40
"""Longer lines have no marker at each point."""
MOST_LETTERS = 32
"""Of a name in a chart."""

P = ParamSpec("P")


def available() -> bool:
    """Return whether figures can be drawn: `pip install 'moerge[figures]'`."""
    return find_spec("matplotlib") is not None


def chart(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that draws a figure, in our style."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return styled


def _style() -> AbstractContextManager[Any]:
    import matplotlib

    settings: Any = {
        "svg.hashsalt": "moerge",
        "svg.fonttype": "none",  # text stays text: it can be found, copied and read aloud
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "legend.fontsize": 8,
        "text.parse_math": False,  # names may hold dollar signs
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    context: AbstractContextManager[Any] = matplotlib.rc_context(settings)
    return context


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def color(index: int) -> str:
    """The colour of a series; after eight they start again, then with `hatch`."""
    return PALETTE[index % len(PALETTE)]


def hatch(index: int) -> str:
    """The hatching of a series' areas: none for the first eight."""
    return HATCHES[index // len(PALETTE) % len(HATCHES)]


def encoded(figure: Figure, kind: str, title: str, description: str) -> bytes:
    """A figure as `svg` or `png`, with a title and description for those who do not see it."""
    about: dict[str, str | None] = {"Title": title, "Description": description}
    about |= {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with _style(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # letters that the font lacks, names that leave no room
        figure.savefig(buffer, format=kind, metadata=about, dpi=PIXELS_PER_INCH)
    return buffer.getvalue()


@dataclass(frozen=True)
class Inline:
    """The inside of an SVG element for a page, and the element's size in pixels."""

    body: str
    width: float
    height: float


def inline(figure: Figure, prefix: str) -> Inline:
    """A figure for an HTML page, without namespaces; `prefix` makes its ids unique there."""
    root = ElementTree.fromstring(encoded(figure, "svg", "", ""))
    for parent in root.iter():
        for child in [child for child in parent if child.tag.endswith(("}metadata", "}style"))]:
            parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value.replace("url(#", f"url(#{prefix}") for key, value in element.attrib.items()}
        if "id" in attributes:
            attributes["id"] = prefix + attributes["id"]
        if attributes.get("href", "").startswith("#"):  # else the pixels of a color bar
            attributes["href"] = f"#{prefix}{attributes['href'][1:]}"
        element.attrib.clear()
        element.attrib.update(attributes)
    body = "".join(ElementTree.tostring(child, encoding="unicode") for child in root)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    return Inline(body, width, height)


def save(figure: Figure, folder: Path, name: str, title: str, description: str) -> tuple[Path, ...]:
    """Write `folder/name.svg` and `.png`; their paths."""
    paths = tuple(folder / f"{name}.{kind}" for kind in ("svg", "png"))
    for path in paths:
        atomic_write(path, encoded(figure, path.suffix[1:], title, description))
    return paths


def check_folder(folder: Path, option: str) -> None:
    """InputError if `folder`, given by `option`, cannot be one: something else is there. To be asked before long work."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{option}: {folder} cannot be a folder: {there} is a file")


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV with a header: the keys of the first row. None is an empty field."""
    listed = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(listed[0]) if listed else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return text.getvalue()


@dataclass(frozen=True)
class Scale:
    """A colour scale: a colour map from `low` to `high`, and a label with the unit."""

    label: str
    colors: str
    low: float
    high: float


def around(centre: float, values: Iterable[float | None], *, least: float, most: float) -> tuple[float, float]:
    """Ends of a scale with `centre` in its middle: round numbers between which all values lie."""
    reach = max((abs(value - centre) for value in values if value is not None), default=0.0)
    steps = [factor * 10.0**power for power in range(-6, 7) for factor in (1, 1.5, 2, 3, 4, 5, 6, 8)]
    side = min(most, next(step for step in steps if step >= max(reach, least) * (1 - 1e-9)))
    return centre - side, centre + side


def heatmap(
    axes: Any, grid_RC: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], scale: Scale
) -> Any:
    """Cells of colour, with numbers where there are few; the first row is on top. Returns what a colour bar is made of."""
    import matplotlib

    values_RC = np.array([[np.nan if value is None else value for value in row] for row in grid_RC], float)
    cells = np.ma.masked_invalid(values_RC)
    axes.set_facecolor(MISSING)
    mesh = axes.pcolormesh(cells, cmap=scale.colors, vmin=scale.low, vmax=scale.high, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 if max(map(len, columns), default=0) > 3 else 0)
    every = max(1, -(-len(rows) // 16)) if len(rows) > 20 else 1
    axes.set_yticks(np.arange(0, len(rows), every) + 0.5, rows[::every])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values_RC.size <= MOST_CELLS_WITH_NUMBERS:
        shades = matplotlib.colormaps[scale.colors]
        for (row, column), value in np.ndenumerate(values_RC):
            if np.isfinite(value):
                shade = shades((value - scale.low) / (scale.high - scale.low))
                dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
                ink = "white" if dark else "black"
                axes.text(column + 0.5, row + 0.5, short(value), ha="center", va="center", fontsize=7, color=ink)
    return mesh


def short(value: float) -> str:
    """A number with two decimals, three below 0.1."""
    text = f"{value:.3f}" if abs(value) < 0.0995 else f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text


@chart
def lines(series: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> Figure:
    """Points from left to right, a line for each name."""
    figure = new_figure(6.4, 3.0 + 0.18 * (len(series) // 4))
    axes = figure.subplots()
    for index, (name, points) in enumerate(series.items()):
        style = DASHES[index % len(DASHES)]
        marker = MARKERS[index % len(MARKERS)] if len(points) <= MOST_MARKERS else ""
        axes.plot(*zip(*points, strict=True), style, color=color(index), marker=marker, markersize=3, linewidth=1.2, label=name)
    axes.set(xlabel=across, ylabel=up)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


@dataclass(frozen=True)
class Panel:
    """Values below each other with the ends of their error bars, by name, and the name of the value to compare with."""

    title: str
    axis: str
    values: Mapping[str, tuple[float, float, float]]
    reference: str | None = None


@chart
def dots(panels: Sequence[Panel]) -> Figure:
    """A panel for each of them, two in a row, with a line at the value to compare with."""
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    most = max(len(panel.values) for panel in panels)
    figure = new_figure(1.6 + 3.4 * across, 0.3 + (0.8 + 0.2 * most) * down)
    grid = list(figure.subplots(down, across, squeeze=False).flat)
    for spare in grid[len(panels) :]:
        spare.remove()
    for axes, panel in zip(grid, panels, strict=False):
        for row, (name, (value, low, high)) in enumerate(panel.values.items()):
            ink = "0.45" if name == panel.reference else color(0)
            axes.plot([low, high], [row, row], color=ink, linewidth=1.4)
            axes.plot([value], [row], "o", color=ink, markersize=5)
        if panel.reference is not None and panel.reference in panel.values:
            axes.axvline(panel.values[panel.reference][0], color="0.6", linewidth=0.8, zorder=0)
        axes.set_yticks(range(len(panel.values)), [shortened(name) for name in panel.values])
        axes.set(title=panel.title, xlabel=panel.axis, ylim=(len(panel.values) - 0.5, -0.5))
    return figure


def shortened(name: str) -> str:
    """A name that leaves room for a chart; tables have it whole."""
    return name if len(name) <= MOST_LETTERS else f"{name[: MOST_LETTERS // 2]}…{name[-(MOST_LETTERS // 2) :]}"
