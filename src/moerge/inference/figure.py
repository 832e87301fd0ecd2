"""Pictures of routing: a stacked bar for each text (MergeME's figures 5 to 9), and a stacked column for each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge import figures
from moerge.checkpoint.manifest import to_json
from moerge.errors import InputError
from moerge.figures import chart, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moerge.inference.result import Routes

_ACROSS = 3
"""Panels beside each other."""


def write_routes(routes: Routes, folder: Path) -> None:
    """Write `route.json` and `route.csv`, of token-routed models also `route-layers.csv`, and figures of both as SVG and PNG
    where matplotlib is installed. The folder is made if need be; InputError if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "route.json").write_bytes(to_json(routes.to_json()))
        (folder / "route.csv").write_text(routes.to_csv(), encoding="utf-8")
        if any(text.layers for text in routes.texts.values()):
            (folder / "route-layers.csv").write_text(routes.layers_csv(), encoding="utf-8")
        if figures.available():
            write(routes, folder)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from None


def write(routes: Routes, folder: Path) -> tuple[Path, ...]:
    """Draw `route` and, where the model routes tokens, `route-layers`, as SVG and PNG; their paths. The same routes give the same
    bytes. Needs matplotlib (the extra `figures`).
    """
    title, description = f"Where {routes.checkpoint} routes texts", spoken(routes)
    written = figures.save(draw(routes), folder, "route", title, description)
    if any(text.layers for text in routes.texts.values()):
        written += figures.save(draw_layers(routes), folder, "route-layers", f"{title}, layer by layer", description)
    return written


def spoken(routes: Routes) -> str:
    """The mean weights in words."""
    shares = {
        name: ", ".join(f"{expert} {100 * text.alpha[expert]:.0f}%" for expert in routes.experts)
        for name, text in routes.texts.items()
    }
    return "Mean weight of each expert. " + ". ".join(f"{name}: {share}" for name, share in shares.items()) + "."


@chart
def draw(routes: Routes) -> Figure:
    """Texts below each other, the mean weight of every expert; below it, thin, how often each has the lowest loss."""
    count = len(routes.texts)
    judged = any(text.best for text in routes.texts.values())
    figure = new_figure(6.4, 1.6 + 0.55 * count)
    axes = figure.subplots()
    _stack(axes, range(count), [_in_order(routes, text.alpha) for text in routes.texts.values()], 0.5, routes.experts)
    best = {row + 0.35: _in_order(routes, text.best) for row, text in enumerate(routes.texts.values()) if text.best}
    _stack(axes, list(best), list(best.values()), 0.14)
    axes.set_yticks(range(count), [f"{name}\nn = {text.documents:,}" for name, text in routes.texts.items()])
    axes.invert_yaxis()
    per = "documents" if routes.level == "sequence" else "tokens and layers"
    below = "\nthin bars: documents on which the expert alone has the lowest loss, %" if judged else ""
    axes.set(xlim=(0, 100), xlabel=f"mean weight over {per}, %; n documents{below}", ylabel="text")
    figure.legend(loc="outside upper center", ncols=min(len(routes.experts), 5), frameon=False)
    return figure


def _in_order(routes: Routes, shares: Mapping[str, float]) -> list[float]:
    return [shares[expert] for expert in routes.experts]


def _stack(
    axes: Any, rows: Sequence[float], shares: Sequence[Sequence[float]], height: float, labels: Sequence[str] = ()
) -> None:
    left = [0.0] * len(rows)
    for index, column in enumerate(zip(*shares, strict=True)):
        widths = [100 * share for share in column]
        style = {"color": figures.color(index), "hatch": figures.hatch(index), "edgecolor": "white", "linewidth": 0.6}
        axes.barh(rows, widths, height, left=left, label=labels[index] if labels else None, **style)
        left = [before + width for before, width in zip(left, widths, strict=True)]


@chart
def draw_layers(routes: Routes) -> Figure:
    """A panel for each text, a column for each layer, the mean weight of every expert."""
    alphas = {name: [_in_order(routes, alpha) for alpha in text.layers or ()] for name, text in routes.texts.items()}
    texts = [name for name, alpha_LE in alphas.items() if alpha_LE]
    across = min(_ACROSS, len(texts))
    down = -(-len(texts) // across)
    figure = new_figure(1.0 + 2.4 * across, 1.0 + 1.9 * down)
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, texts, strict=False):
        alpha_LE = alphas[name]
        layers, bottom = range(len(alpha_LE)), [0.0] * len(alpha_LE)
        for index, column in enumerate(zip(*alpha_LE, strict=True)):
            heights = [100 * share for share in column]
            style = {"color": figures.color(index), "hatch": figures.hatch(index), "edgecolor": "white", "linewidth": 0.4}
            label = routes.experts[index] if name == texts[0] else None
            axes.bar(layers, heights, 0.9, bottom=bottom, label=label, **style)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set(title=f"{name} (n = {routes.texts[name].documents})", ylim=(0, 100))
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels.flat[len(texts) :]:
        axes.set_visible(False)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("mean weight over tokens, %", fontsize=9)
    figure.legend(loc="outside upper center", ncols=min(len(routes.experts), 5), frameon=False)
    return figure
