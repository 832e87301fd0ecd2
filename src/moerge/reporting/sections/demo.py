"""The demo's table of perplexities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from moerge.demonstration.result import DemoModel, DemoResult
from moerge.figures import Panel, dots
from moerge.reporting.blocks import Block, Column, Figure, Table, Text, number, words


def demo(file: DemoResult) -> list[Block]:
    """A figure with a panel for each domain, and the table."""
    domains = list(dict.fromkeys(["mean", *(domain for model in file.models for domain in model.perplexity)]))
    base = next((model.model for model in file.models if model.kind == "base"), None)
    panels = []
    for domain in domains:
        values = {model.model: model.perplexity[domain] for model in file.models if domain in model.perplexity}
        if values:
            panels.append(Panel(domain, "perplexity", {name: (value,) * 3 for name, value in values.items()}, base))
    title = f"The demo (seed {file.seed}): held-out perplexity, lower is better"
    spoken = [f"{panel.title}: {', '.join(f'{name} {y:.2f}' for name, (y, _, _) in panel.values.items())}" for panel in panels]
    note = "The mean is geometric. All models share a tokenizer, so their perplexities compare. The demo computes no standard "
    note += "errors: `moerge eval` does. The line is the base."
    figures = [Figure(title, f"{'. '.join(spoken)}.", partial(dots, panels), [_table(file, domains)])] if panels else []
    return [*figures, Text(note, "note")]


def demo_glance(file: DemoResult) -> list[str]:
    """The best merged model and the base, in a sentence."""
    best, base = _best(_merged(file), "mean"), next((model for model in file.models if model.kind == "base"), None)
    if best is None or base is None or "mean" not in base.perplexity:
        return []
    return [
        f"`{best.model}` has the lowest mean perplexity of the merged models, {best.perplexity['mean']:.2f}; the base has "
        f"{base.perplexity['mean']:.2f}. One run without standard errors: small gaps mean nothing."
    ]


def _merged(file: DemoResult) -> list[DemoModel]:
    return [model for model in file.models if model.kind not in ("base", "expert")]


def _best(models: Sequence[DemoModel], domain: str) -> DemoModel | None:
    having = [model for model in models if domain in model.perplexity]
    return min(having, key=lambda model: model.perplexity[domain]) if having else None


def _table(file: DemoResult, domains: Sequence[str]) -> Table:
    best: Mapping[str, DemoModel | None] = {domain: _best(_merged(file), domain) for domain in domains}
    columns = [Column("model"), Column("kind"), *(Column(domain, numeric=True) for domain in domains)]
    rows = []
    for model in file.models:
        cells = [number(model.perplexity.get(domain), 2, "best" if best[domain] is model else "") for domain in domains]
        rows.append([words(model.model), words(model.kind), *cells])
    return Table("Held-out perplexity", columns, rows, "Bold: the best merged model of a column.")
