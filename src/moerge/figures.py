"""Figures: colours that colour-blind people can tell apart, vector and pixel files, and the same data beside them.

A chart is a function that returns a matplotlib `Figure`, decorated with `chart`; `save` writes it. The same data give the same
bytes with the same version of matplotlib. matplotlib (the extra `figures`) is imported when something is drawn.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

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
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    context: AbstractContextManager[Any] = matplotlib.rc_context(settings)
    return context


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, whose parts make room for each other."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def colour(index: int) -> str:
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
    with _style():
        figure.savefig(buffer, format=kind, metadata=about, dpi=PIXELS_PER_INCH)
    return buffer.getvalue()


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
    colours: str
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
    mesh = axes.pcolormesh(cells, cmap=scale.colours, vmin=scale.low, vmax=scale.high, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90 if max(map(len, columns), default=0) > 3 else 0)
    every = max(1, -(-len(rows) // 16)) if len(rows) > 20 else 1
    axes.set_yticks(np.arange(0, len(rows), every) + 0.5, rows[::every])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values_RC.size <= MOST_CELLS_WITH_NUMBERS:
        shades = matplotlib.colormaps[scale.colours]
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
