"""The learned coefficients as a picture: layers down, roles across, a panel for each expert."""

from __future__ import annotations

import re
from pathlib import Path

from moerge.recipe.coefficients import Coefficients

_LAYER = re.compile(r"^(?P<before>.*?)(?:^|\.)(?P<layer>\d+)\.(?P<part>.*?)(?:\.weight)?$")


def table(found: Coefficients) -> tuple[list[int], list[str], dict[str, dict[tuple[int, str], float]]]:
    """Layers, parts of a layer, and for each expert its mean coefficient by layer and part."""
    values: dict[str, dict[tuple[int, str], float]] = {expert: {} for expert in found.experts}
    layers, parts = set(), []
    for name, rows in found.by_tensor.items():
        match = _LAYER.match(name)
        layer, part = (int(match["layer"]), match["part"]) if match else (-1, name.removesuffix(".weight"))
        layers.add(layer)
        parts += [part] if part not in parts else []
        for expert, row in zip(found.experts, rows, strict=True):
            values[expert][layer, part] = sum(row) / len(row)
    return sorted(layers), parts, values


def draw(found: Coefficients, path: Path) -> None:
    """Draw and save; the same coefficients give the same bytes. Needs matplotlib (the extra `figures`)."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    layers, parts, values = table(found)
    grids = {
        expert: np.array([[by_place.get((layer, part), np.nan) for part in parts] for layer in layers])
        for expert, by_place in values.items()
    }
    highest = max(float(np.nanmax(grid)) for grid in grids.values())
    with matplotlib.rc_context({"svg.hashsalt": "moerge", "svg.fonttype": "none"}):
        width, height = 1.2 + len(grids) * (0.6 + 0.32 * len(parts)), 2.2 + 0.22 * len(layers)
        figure = Figure(figsize=(max(5.0, width), height), layout="constrained")
        for axes, (expert, grid) in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids.items(), strict=True):
            image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
            axes.set_title(f"{expert}, mean {found.means()[expert]:.3g}", fontsize=9)
            axes.set_xticks(range(len(parts)), [part.split(".")[-1] for part in parts], rotation=90, fontsize=8)
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=8)
        figure.axes[0].set_ylabel("layer")
        figure.colorbar(image, ax=figure.axes, label=f"coefficient (started at {found.fixed:.3g})")
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None, dpi=150)
