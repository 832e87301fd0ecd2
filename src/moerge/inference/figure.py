"""A stacked bar for each text: the mean weight of every expert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moerge.inference.routes import Routes


def draw(routes: Routes, path: Path) -> None:
    """Draw and save; the same routes give the same bytes. Needs matplotlib (the extra `figures`)."""
    import matplotlib
    from matplotlib.figure import Figure

    names = [text.name for text in routes.texts]
    with matplotlib.rc_context({"svg.hashsalt": "moerge", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 1.4 + 0.4 * len(names)), layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(names)
        for index, expert in enumerate(routes.experts):
            widths = [100 * text.alpha_E[index] for text in routes.texts]
            axes.barh(names, widths, left=left, label=expert)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlim=(0, 100), xlabel="mean weight, %", ylabel="text")
        figure.legend(loc="outside upper center", ncols=min(len(routes.experts), 5), frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
