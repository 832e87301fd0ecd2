"""Routing of texts to experts: MergeME's table 2 and figures 5 to 9 for any model and text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from moerge.formatting import plural, short_names
from moerge.inference.figure import draw, draw_layers, spoken
from moerge.inference.result import Routes
from moerge.reporting.blocks import (
    Block,
    Cell,
    Column,
    Figure,
    Fold,
    Section,
    Table,
    Text,
    count,
    number,
    percent,
    words,
)
from moerge.reporting.data import Collected

_MEANING = {
    "sequence": "A sequence-routed model weighs whole documents: its bar is the mean weight of each expert over the documents "
    "(MergeME, table 2 and figure 9).",
    "token": "A token-routed model weighs every token in every layer: its bar is the mean of the router's softmax over all "
    "experts, over layers and tokens (MergeME, figures 5 to 8).",
}
_THIN = (
    "The thin bars say how often each expert, alone, has the lowest loss on a document: what the best choice by document "
    "would be."
)
_PAPER = {
    "sequence": "In the paper, perplexity routing gives the largest weight, or an equal one, to the expert of the text's domain "
    "on GSM8K, MATH, NQ and TriviaQA; on HumanEval math has 45% and code 43%, on MBPP math has 44% and code 22%. It finds "
    "perplexity better than task vectors (figure 9).",
    "token": "In the paper, fine-tuned routers send 0.28 of GSM8K to the math expert after averaging, 0.35 after TIES and 0.46 "
    "after DARE. A random router that was not fine-tuned cannot know domains.",
}
_TABLE_2 = {
    "GSM8K": (23, 2, 43, 32),
    "MATH": (22, 2, 49, 27),
    "MBPP": (19, 22, 44, 15),
    "HumanEval": (5, 43, 45, 7),
    "NQ": (43, 4, 10, 43),
    "TriviaQA": (50, 0, 0, 50),
}


def routing(found: Collected) -> Section | None:
    """Stacked bars, shares layer by layer, and tables of shares, accuracy, entropy and balance."""
    if not found.routes:
        return None
    short = short_names([route.checkpoint for route in found.routes])
    names = [short[route.checkpoint] for route in found.routes]
    if len(set(names)) < len(names):  # one model, routed several times
        names = [f"{name} ({route.folder})" for name, route in zip(names, found.routes, strict=True)]
    named = list(zip(names, found.routes, strict=True))
    levels = list(dict.fromkeys(route.level for route in found.routes))
    blocks: list[Block] = [Text(_MEANING[level]) for level in levels if level in _MEANING]
    blocks += [_shares(name, route) for name, route in named]
    if any(text.best for _, route in named for text in route.texts.values()):
        blocks.append(Text(_THIN, "note"))
    blocks.append(_weights(named, "Shares, accuracy and entropy by model and text"))
    blocks += [Text(_PAPER[level], "note") for level in levels if level in _PAPER]
    if "sequence" in levels:
        blocks.append(Fold("The paper's table 2, to compare with", [_table_2()]))
    blocks.append(_summary(named))
    for name, route in named:
        if any(text.layers for text in route.texts.values()):
            blocks.append(Fold(f"{name}: layer by layer", [_layers(name, route)]))
        if route.warnings:
            blocks.append(Text(f"{name}: {' '.join(route.warnings)}", "warning"))
    return Section("routing", "Where texts go", blocks, _glance(named))


def _shares(name: str, route: Routes) -> Figure:
    return Figure(
        f"{name}: mean weight of each expert",
        spoken(route),
        partial(draw, route),
        [_weights([(name, route)], f"{name}: shares, accuracy and entropy")],
    )


def _weights(named: Sequence[tuple[str, Routes]], caption: str) -> Table:
    experts = list(dict.fromkeys(expert for _, route in named for expert in route.experts))
    columns = [Column("model"), Column("text"), Column("documents", numeric=True)]
    columns += [Column(expert, "%", numeric=True) for expert in experts]
    columns += [
        Column("accuracy", "%", numeric=True),
        Column("oracle", "%", numeric=True),
        Column("entropy", "nats", numeric=True),
    ]
    rows = []
    for name, route in named:
        for label, text in route.texts.items():
            most = max(text.alpha.values())
            shares = [percent(text.alpha.get(expert), 1, "best" if text.alpha.get(expert) == most else "") for expert in experts]
            judged = [percent(text.accuracy), percent(text.oracle_accuracy), number(text.entropy, 2)]
            rows.append([words(name), words(label), count(text.documents), *shares, *judged])
    note = (
        "Accuracy: how often the expert with the largest weight is that of the text's own name. Oracle: how often it is the one "
    )
    note += "with the lowest loss on the document. The largest share of a row is bold."
    return Table(caption, columns, rows, note)


def _summary(named: Sequence[tuple[str, Routes]]) -> Table:
    experts = list(dict.fromkeys(expert for _, route in named for expert in route.experts))
    columns = [Column("model"), Column("routes"), Column("accuracy", "%", numeric=True), Column("oracle", "%", numeric=True)]
    columns += [Column("balance", numeric=True), *(Column(f"load of {expert}", "%", numeric=True) for expert in experts)]
    rows = [
        [
            words(name),
            words(f"{route.level}s"),
            percent(route.accuracy),
            percent(route.oracle_accuracy),
            number(route.balance, 2),
            *(percent(route.load.get(expert), 1) for expert in experts),
        ]
        for name, route in named
    ]
    note = "Means over the texts, each counting the same. Balance is E · Σ first · load over the E experts: near 1 where all get "
    note += "the same, E where one gets everything."
    return Table("Accuracy and load balance", columns, rows, note)


def _layers(name: str, route: Routes) -> Figure:
    rows = [
        [words(label), count(index), *(percent(layer[expert], 1) for expert in route.experts)]
        for label, text in route.texts.items()
        for index, layer in enumerate(text.layers or ())
    ]
    columns = [Column("text"), Column("layer", numeric=True), *(Column(expert, "%", numeric=True) for expert in route.experts)]
    table = Table(f"{name}: mean weight in each layer", columns, rows)
    return Figure(f"{name}: mean weight of each expert in each layer", spoken(route), partial(draw_layers, route), [table])


def _table_2() -> Table:
    columns = [Column("benchmark"), *(Column(name, "%", numeric=True) for name in ("base", "code", "math", "knowledge"))]
    rows: list[Sequence[Cell]] = []
    for benchmark, shares in _TABLE_2.items():
        rows.append([words(benchmark), *(percent(share / 100, 0, "best" if share == max(shares) else "") for share in shares)])
    return Table("MergeME, table 2: routing probability of perplexity routing", columns, rows)


def _glance(named: Sequence[tuple[str, Routes]]) -> list[str]:
    judged = [(route.accuracy, name, route) for name, route in named if route.accuracy is not None]
    if not judged:
        return [f"{plural(len(named), 'model')} routed, none on texts that have an expert of their name."]
    accuracy, name, route = max(judged, key=lambda entry: entry[0])
    what = "sequences" if route.level == "sequence" else "token choices"
    others = f"; none of the {len(judged)} models sends more" if len(judged) > 1 else ""
    return [f"`{name}` sends {100 * accuracy:.0f}% of {what} to the text's own expert first{others}."]
