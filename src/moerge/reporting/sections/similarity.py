"""Similarity of the experts, and the verdict before merging: MergeME's figure 4, sign conflicts, and what TIES would trim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moerge.formatting import listed
from moerge.reporting.blocks import (
    Block,
    Column,
    Figure,
    Fold,
    Grid,
    Heading,
    Key,
    Section,
    Table,
    Text,
    count,
    number,
    percent,
    words,
)
from moerge.reporting.data import Collected, Comparison, ExpertRow, PairRow
from moerge.reporting.svg import Bar, Line, lines, stacked_bars

_MOST_LINES = 6
_FATES = (("survives", 3), ("outvoted", 2), ("trimmed", 0))
_TONES = {"merge": "good", "merge with care": "care", "keep separate": "apart"}
_PAPER = (
    "The paper's figure 4 finds low similarity between its math and its code expert in attention as well as in feed-forward "
    "layers, which speaks against plain averages of either."
)


def similarity(found: Collected, colours: Mapping[str, int]) -> Section | None:
    """Verdicts, cosines by layer, and tables of roles for each comparison."""
    if not found.comparisons:
        return None
    blocks: list[Block] = []
    glance = []
    for comparison in found.comparisons:
        if len(found.comparisons) > 1:
            blocks.append(Heading(f"{comparison.recipe} ({comparison.folder})"))
        blocks += list(_comparison(comparison, colours))
        prefix = f"`{comparison.recipe}`: " if len(found.comparisons) > 1 else "Before merging: "
        glance.append(f"{prefix}{comparison.advice}.")
    return Section("similarity", "How alike the experts are", blocks, glance)


def _comparison(comparison: Comparison, colours: Mapping[str, int]) -> Iterator[Block]:
    yield Text(f"Advice: {comparison.advice}.", "advice")
    yield _verdicts(comparison)
    if comparison.unheeded:
        yield Text(f"This recipe merges {listed(comparison.unheeded)}, against the verdict.", "warning")
    yield from (Text(warning, "warning") for warning in comparison.warnings)
    if any(pair.scope == "layer" and pair.layer is not None for pair in comparison.pairs):
        yield _cosines(comparison)
        yield Text(_PAPER, "note")
    if any(row.survives is not None for row in comparison.rows):
        yield _ties(comparison)
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


def _by_pair(pairs: Sequence[PairRow]) -> dict[str, list[PairRow]]:
    found: dict[str, list[PairRow]] = {}
    for pair in pairs:
        found.setdefault(f"{pair.a} and {pair.b}", []).append(pair)
    return found


def _cosines(comparison: Comparison) -> Grid:
    """A figure for each role but norms, which are few numbers, with a line for each pair; of more than six pairs their mean."""
    layered = [pair for pair in comparison.pairs if pair.scope == "layer" and pair.layer is not None]
    drawn = [pair for pair in layered if pair.role != "norm"] or layered
    within = [0.0, *(pair.cosine for pair in drawn if pair.cosine is not None)]
    figures, legend = [], list[Key]()
    for role in dict.fromkeys(pair.role for pair in drawn):
        series = _lines_of([pair for pair in drawn if pair.role == role])
        legend = [Key(line.name, line.colour, line=True, dash=line.dash % 4) for line in series]
        ends = listed([f"{line.name} {line.points[0][1]:.2f} to {line.points[-1][1]:.2f}" for line in series])
        described = f"Cosine from the first layer to the last: {ends}."
        figures.append(Figure(role, described, lines(series, "layer", "cosine similarity", within=within, height=170)))
    rows = [
        [
            words(pair.role),
            words(f"{pair.a} and {pair.b}"),
            count(pair.layer or 0),
            number(pair.cosine, 3),
            percent(pair.sign_conflict_changed, 1),
        ]
        for pair in layered
    ]
    columns = [Column("role"), Column("experts"), Column("layer", numeric=True), Column("cosine", numeric=True)]
    table = Table("Each pair in each layer", [*columns, Column("opposite signs", "%", numeric=True)], rows)
    title = f"Cosine similarity of {comparison.compared} by layer: 1 the same direction, 0 unrelated, below 0 opposed"
    return Grid(title, figures, legend, [table])


def _lines_of(pairs: Sequence[PairRow]) -> list[Line]:
    points = {
        name: [(float(pair.layer), pair.cosine) for pair in found if pair.layer is not None and pair.cosine is not None]
        for name, found in _by_pair(pairs).items()
    }
    shown = points if len(points) <= _MOST_LINES else {"mean over all pairs": _mean(list(points.values()))}
    return [Line(name, 1 + index, found, index) for index, (name, found) in enumerate(shown.items()) if found]


def _mean(series: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    by_layer: dict[float, list[float]] = {}
    for points in series:
        for layer, value in points:
            by_layer.setdefault(layer, []).append(value)
    return [(layer, sum(values) / len(values)) for layer, values in sorted(by_layer.items())]


def _ties(comparison: Comparison) -> Figure:
    rows = [row for row in comparison.rows if row.scope == "model" and row.survives is not None]
    bars = [Bar(row.expert, f"{row.parameters:,} parameters", _fates(row)) for row in rows]
    spoken = [f"{row.expert} keeps {100 * (row.survives or 0):.0f}%" for row in rows]
    density = "/".join(f"{value:g}" for value in comparison.densities)
    title = f"What TIES at density {density} makes of each task vector, as a share of its sum of magnitudes, %"
    legend = [Key("merged", 3), Key("outvoted: of the wrong sign", 2), Key("trimmed: too small", 0)]
    return Figure(title, f"{listed(spoken)}.", stacked_bars(bars), [_experts(comparison)], legend)


def _fates(row: ExpertRow) -> list[tuple[int, float]]:
    return [(colour, getattr(row, fate) or 0.0) for fate, colour in _FATES]


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
