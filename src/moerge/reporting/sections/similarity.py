"""Similarity of the experts, and the verdict before merging: MergeME's figure 4, sign conflicts, and what TIES would trim."""

from __future__ import annotations

from collections.abc import Iterator

from moerge.comparison.charts import charts
from moerge.comparison.result import Comparison
from moerge.formatting import listed
from moerge.reporting.blocks import (
    Block,
    Column,
    Figure,
    Fold,
    Heading,
    Section,
    Table,
    Text,
    count,
    number,
    percent,
    words,
)
from moerge.reporting.data import Collected

_TONES = {"merge": "good", "merge with care": "care", "keep separate": "apart"}
_PAPER = (
    "The paper's figure 4 finds low similarity between its math and its code expert in attention as well as in feed-forward "
    "layers, which speaks against plain averages of either."
)


def similarity(found: Collected) -> Section | None:
    """Verdicts, cosines by layer, and tables of roles for each comparison."""
    if not found.comparisons:
        return None
    blocks: list[Block] = []
    glance = []
    for comparison in found.comparisons:
        if len(found.comparisons) > 1:
            blocks.append(Heading(f"{comparison.recipe} ({comparison.folder})"))
        blocks += list(_comparison(comparison))
        prefix = f"`{comparison.recipe}`: " if len(found.comparisons) > 1 else "Before merging: "
        glance.append(f"{prefix}{comparison.advice}.")
    return Section("similarity", "How alike the experts are", blocks, glance)


def _comparison(comparison: Comparison) -> Iterator[Block]:
    yield Text(f"Advice: {comparison.advice}.", "advice")
    yield _verdicts(comparison)
    if comparison.ignored_advice:
        yield Text(f"This recipe merges {listed(comparison.ignored_advice)}, against the verdict.", "warning")
    yield from (Text(warning, "warning") for warning in comparison.warnings)
    for name, chart in charts(comparison.similarity).items():
        data = [_experts(comparison) if name in ("drift", "ties") else _layers(comparison)]
        yield Figure(chart.title, chart.description, chart.draw, data)
        if name == "pairs":
            yield Text(_PAPER, "note")
    yield Fold("Pairs of experts by role", [_pairs(comparison)])
    yield Fold("Experts by role", [_experts(comparison)])


def _verdicts(comparison: Comparison) -> Table:
    columns = [Column("role"), Column("verdict"), Column("because", long=True), Column("parameters", numeric=True)]
    columns += [Column("cosine", numeric=True), Column("opposite signs", "%", numeric=True)]
    columns += [Column("drift", numeric=True), Column("distance", numeric=True)]
    rows = [
        [
            words(verdict.role),
            words(verdict.answer, _TONES.get(verdict.answer, "")),
            words(verdict.reason),
            count(verdict.parameters),
            number(verdict.cosine, 2),
            percent(verdict.sign_conflict),
            number(verdict.drift, 2),
            number(verdict.distance, 2),
        ]
        for verdict in comparison.verdicts
    ]
    note = (
        f"Cosine: of the {comparison.compared}, mean over pairs of experts. Opposite signs: among parameters that both changed. "
    )
    note += (
        "Drift: the norm of a task vector over the base's, the largest. Distance: of two experts over their norms, the largest."
    )
    return Table(f"Verdict before merging ({comparison.recipe})", columns, rows, note)


def _layers(comparison: Comparison) -> Table:
    columns = [Column("role"), Column("experts"), Column("layer", numeric=True), Column("cosine", numeric=True)]
    rows = [
        [
            words(pair.role),
            words(f"{pair.a} and {pair.b}"),
            count(pair.layer),
            number(pair.cosine, 3),
            percent(pair.sign_conflict_changed, 1),
        ]
        for pair in comparison.pairs
        if pair.scope == "layer" and pair.layer is not None
    ]
    return Table("Each pair in each layer", [*columns, Column("opposite signs", "%", numeric=True)], rows)


def _pairs(comparison: Comparison) -> Table:
    columns = [Column("role"), Column("experts"), Column("parameters", numeric=True), Column("cosine", numeric=True)]
    columns += [
        Column("opposite signs", "%", numeric=True),
        Column("distance", numeric=True),
        Column("cosine of parameters", numeric=True),
    ]
    rows = [
        [
            words(pair.role),
            words(f"{pair.a} and {pair.b}"),
            count(pair.parameters),
            number(pair.cosine, 3),
            percent(pair.sign_conflict_changed, 1),
            number(pair.relative_distance, 3),
            number(pair.parameter_cosine, 3),
        ]
        for pair in comparison.pairs
        if pair.scope in ("role", "model")
    ]
    return Table("Pairs of experts by role, over all layers", columns, rows)


def _experts(comparison: Comparison) -> Table:
    columns = [Column("role"), Column("expert"), Column("norm", numeric=True), Column("over the base's", numeric=True)]
    columns += [Column(name, "%", numeric=True) for name in ("left in the average", "trimmed", "outvoted", "merged")]
    rows = [
        [
            words(row.role),
            words(row.expert),
            number(row.norm, 3),
            number(row.relative_norm, 3),
            percent(row.averaged, 1),
            percent(row.trimmed, 1),
            percent(row.outvoted, 1),
            percent(row.survives, 1),
        ]
        for row in comparison.rows
        if row.scope in ("role", "model")
    ]
    note = (
        "Left in the average: the plain average's projection on the expert's task vector. Trimmed, outvoted and merged: shares "
    )
    note += "of its sum of magnitudes in TIES. A dash: needs a base."
    return Table(f"Experts by role, over all layers: norm of their {comparison.compared}", columns, rows, note)
