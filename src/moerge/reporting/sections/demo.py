"""The demo's table of perplexities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moerge.demonstration.result import DemoModel, DemoResult
from moerge.reporting.blocks import Block, Column, Figure, Grid, Key, Table, number, words
from moerge.reporting.svg import Dot, dots

_KINDS = {"base": (0, "base"), "expert": (1, "expert"), "dense": (2, "dense merge"), "moe": (3, "mixture of experts")}


def demo(file: DemoResult) -> list[Block]:
    """A figure for each domain, and the table."""
    domains = list(dict.fromkeys(["mean", *(domain for model in file.models for domain in model.perplexity)]))
    figures = [_domain(file, domain) for domain in domains]
    legend = [Key(name, colour) for kind, (colour, name) in _KINDS.items() if any(model.kind == kind for model in file.models)]
    title = f"The demo (seed {file.seed}): held-out perplexity, lower is better"
    note = (
        "The mean is geometric. All models share a tokenizer, so that their perplexities compare. The demo computes no standard "
    )
    note += "errors: `moerge eval` does. The line is the base."
    return [Grid(title, figures, legend, [_table(file, domains)], note)]


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


def _domain(file: DemoResult, domain: str) -> Figure:
    having = [model for model in file.models if domain in model.perplexity]
    points = []
    for model in having:
        value, colour = model.perplexity[domain], _KINDS.get(model.kind, (4, ""))[0]
        points.append(Dot(model.model, f"{value:.2f}", colour, value, value, value))
    base = next((model.perplexity[domain] for model in having if model.kind == "base"), None)
    described = f"Perplexity on {domain}: {', '.join(f'{model.model} {model.perplexity[domain]:.2f}' for model in having)}."
    return Figure(domain, described, dots(points, "perplexity", reference=None if base is None else (base, "base")))


def _table(file: DemoResult, domains: Sequence[str]) -> Table:
    best: Mapping[str, DemoModel | None] = {domain: _best(_merged(file), domain) for domain in domains}
    columns = [Column("model"), Column("kind"), *(Column(domain, numeric=True) for domain in domains)]
    rows = []
    for model in file.models:
        cells = [number(model.perplexity.get(domain), 2, "best" if best[domain] is model else "") for domain in domains]
        rows.append([words(model.model), words(model.kind), *cells])
    return Table("Held-out perplexity", columns, rows, "Bold: the best merged model of a column.")
