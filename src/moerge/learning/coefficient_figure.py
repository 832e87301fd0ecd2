"""The learned coefficients as a table and a picture: layers down, parts of a layer across, a panel for each expert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from moerge import figures
from moerge.figures import Scale, chart, heatmap, new_figure
from moerge.recipe.coefficients import Coefficients
from moerge.results import Data

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER = re.compile(r"^(?P<before>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<part>.*?)(?:\.weight)?$")


class CoefficientTable(Data):
    """For each expert a row for each layer (-1 outside of layers) with the mean coefficient of each part, None where none is."""

    experts: tuple[str, ...] = ()
    initial: float | None = None
    layers: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    coefficients: Mapping[str, tuple[tuple[float | None, ...], ...]] = {}
    means: Mapping[str, float] = {}


def table(learned: Coefficients) -> CoefficientTable:
    """The mean over the chunks of each tensor."""
    values: dict[str, dict[tuple[int, str], float]] = {expert: {} for expert in learned.experts}
    for name, rows in learned.by_tensor.items():
        match = _LAYER.match(name)
        place = (int(match["layer"]), match["part"]) if match else (-1, name.removesuffix(".weight"))
        for expert, row in zip(learned.experts, rows, strict=True):
            values[expert][place] = sum(row) / len(row)
    places = dict.fromkeys(place for by_place in values.values() for place in by_place)
    layers, parts = sorted({layer for layer, _ in places}), list(dict.fromkeys(part for _, part in places))
    return CoefficientTable(
        experts=learned.experts,
        initial=learned.fixed,
        layers=tuple(layers),
        parts=tuple(parts),
        coefficients={
            expert: tuple(tuple(by_place.get((layer, part)) for part in parts) for layer in layers)
            for expert, by_place in values.items()
        },
        means=learned.means(),
    )


@chart
def draw(learned: CoefficientTable) -> Figure:
    """Coefficients as colors, on one scale for all experts."""
    grids = learned.coefficients
    highest = max((abs(value) for grid in grids.values() for row in grid for value in row if value is not None), default=0) or 1.0
    width, height = 1.4 + len(grids) * (0.8 + 0.34 * len(learned.parts)), 2.2 + 0.22 * len(learned.layers)
    figure = new_figure(max(5.0, width), height)
    rows, columns = [str(layer) for layer in learned.layers], [part.split(".")[-1] for part in learned.parts]
    started = f" (started at {learned.initial:.3g})" if learned.initial is not None else ""
    scale = Scale(f"coefficient{started}", "viridis", 0, highest)
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    for axes, (expert, grid) in zip(panels, grids.items(), strict=True):
        mesh = heatmap(axes, grid, rows, columns, scale)
        axes.set_title(f"{figures.shortened(expert)}, mean {learned.means.get(expert, 0):.3g}")
    panels[0].set_ylabel("layer")
    figure.colorbar(mesh, ax=list(panels), label=scale.label)
    return figure
