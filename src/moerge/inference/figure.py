"""A stacked bar for each text, the mean weight of every expert; and below it a thin one, how often each has the lowest loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moerge.inference.routes import Routes


def draw(routes: Routes, path: Path) -> None:
    """Draw and save; the same routes give the same bytes. Needs matplotlib (the extra `figures`)."""
    import matplotlib
    from matplotlib.figure import Figure

    count = len(routes.texts)
    judged = any(text.oracle for text in routes.texts)
    with matplotlib.rc_context({"svg.hashsalt": "moerge", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 1.6 + 0.5 * count), layout="constrained")
        axes = figure.subplots()
        _stack(axes, list(range(count)), [text.alpha_E for text in routes.texts], 0.5, routes.experts)
        rows = [(row + 0.35, text.oracle.best_E) for row, text in enumerate(routes.texts) if text.oracle]
        _stack(axes, [row for row, _ in rows], [best_E for _, best_E in rows], 0.14)
        axes.set_yticks(range(count), [text.name for text in routes.texts])
        axes.invert_yaxis()
        below = "\nthin bars: documents on which the expert alone has the lowest loss, %" if judged else ""
        axes.set(xlim=(0, 100), xlabel=f"mean weight, %{below}", ylabel="text")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=min(len(routes.experts), 5), frameon=False)
        figure.savefig(path, metadata={"Date": None, "Creator": None} if path.suffix == ".svg" else None)


def _stack(
    axes: Any, rows: Sequence[float], shares: Sequence[Sequence[float]], height: float, labels: Sequence[str] = ()
) -> None:
    left = [0.0] * len(rows)
    for index, column in enumerate(zip(*shares, strict=True)):
        widths = [100 * share for share in column]
        label = labels[index] if labels else None
        axes.barh(rows, widths, height, left=left, color=f"C{index}", label=label, edgecolor="white", linewidth=0.6)
        left = [before + width for before, width in zip(left, widths, strict=True)]
