"""Learned coefficients and learning curves, and the metrics of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from moerge.formatting import listed, short_names
from moerge.reporting.blocks import (
    Block,
    Code,
    Column,
    Facts,
    Figure,
    Fold,
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
from moerge.reporting.data import Collected, Learning, Tuned, Tuning
from moerge.reporting.svg import Line, lines


def learning(found: Collected, colours: Mapping[str, int]) -> Section | None:
    """Curves, and the coefficients of each expert by layer and part of a layer."""
    if not found.learnings:
        return None
    names = short_names([file.folder for file in found.learnings])
    blocks: list[Block] = []
    glance = []
    for file in found.learnings:
        name = found.folder if file.folder == "." else names[file.folder]
        curves = list(_curves(name, file))
        blocks += curves or [Text(f"{name} was learned without a curve.", "note")]
        if file.means:
            blocks += _coefficients(name, file)
            means = listed([f"{expert} {mean:.2f}" for expert, mean in file.means.items()])
            glance.append(f"`{name}` learned coefficients with the means {means}; all started at {file.initial:.2g}.")
    return Section("learning", "What was learned", blocks, glance)


def _curves(name: str, file: Learning) -> Iterator[Figure]:
    for index, stage in enumerate(file.stages, 1):
        series = []
        for number_, (kind, colour) in enumerate((("train", 1), ("heldout", 2))):
            points = [(row.update, getattr(row, kind)) for row in stage.updates if getattr(row, kind) is not None]
            if points:
                series.append(Line({"train": "training", "heldout": "held out"}[kind], colour, points, 2 * (1 - number_)))
        if not series:
            continue
        ends = [f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in series]
        kept = f"; update {stage.best_update} was kept" if stage.best_update is not None else ""
        early = ", stopped early" if stage.stopped_early else ""
        stages = f", stage {index}" if len(file.stages) > 1 else ""
        objective = f" ({file.objective})" if file.objective else ""
        title = f"{name}{stages}: the objective{objective} after each update{kept}{early}"
        drawing = lines(series, "update", "objective")
        legend = _legend(series)
        columns = [Column("update", numeric=True), Column("training", numeric=True), Column("held out", numeric=True)]
        rows = [[count(row.update), number(row.train, 4), number(row.heldout, 4)] for row in stage.updates]
        yield Figure(title, f"The objective: {listed(ends)}.", drawing, [Table(f"{name}: the curve", columns, rows)], legend)


def _coefficients(name: str, file: Learning) -> list[Block]:
    """A table for each expert; the ground of a cell is the deeper the larger its coefficient."""
    values = [value for grid in file.coefficients.values() for row in grid for value in row if value is not None]
    highest = max(map(abs, values), default=1.0) or 1.0
    tables: list[Block] = []
    for expert, grid in file.coefficients.items():
        columns = [Column("layer"), *(Column(part.rpartition("model.")[2] or part, numeric=True) for part in file.parts)]
        rows = [
            [
                words("–" if layer < 0 else str(layer)),
                *(number(value, 2, heat=None if value is None else value / highest) for value in row),
            ]
            for layer, row in zip(file.layers, grid, strict=False)
        ]
        tables.append(Table(f"{expert}: mean coefficient of each tensor", columns, rows))
    note = (
        f"All coefficients started at {file.initial:.3g}. A dash: outside of layers, or no such tensor." if file.initial else ""
    )
    return [Fold(f"{name}: coefficients by layer", [*tables, Text(note, "note")])] if tables else []


_NO_LOSSES = ("tokens", "learning_rate", "grad_norm", "tokens_per_second")


def tuning(found: Collected) -> Section | None:
    """Losses and the experts' load over the steps, and what each run was told."""
    if not found.tunings and not found.tuned:
        return None
    blocks: list[Block] = []
    for run in found.tuned:
        blocks += [Heading(run.folder), _facts(run), Fold("Settings", [Code(_yaml(run.settings), "The settings, as YAML")])]
    for file in found.tunings:
        losses = [key for key in file.points if key not in _NO_LOSSES]
        skipped = f", every {file.every} steps" if file.every > 1 else ""
        if losses:
            blocks.append(_metrics(f"{file.path}: losses{skipped}", file, losses, "loss"))
        if file.load:
            blocks.append(_load(f"{file.path}: load of each expert, mean over layers{skipped}", file))
        blocks.append(Fold(f"{file.path}: all numbers", [_numbers(file.path, file, list(file.points))]))
    steps = [f"{file.steps:,} steps in `{file.path}`" for file in found.tunings]
    return Section("tuning", "Fine-tuning", blocks, [f"Fine-tuned: {listed(steps)}."] if steps else [])


def _yaml(held: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(held), sort_keys=False, allow_unicode=True))


def _facts(run: Tuned) -> Facts:
    pairs = [("made by", ", ".join(f"{name} {number}" for name, number in run.versions.items()))]
    pairs += [("took", f"{run.seconds:,.0f} s")] if run.seconds is not None else []
    for name, model in run.models.items():
        about = model if isinstance(model, dict) else {"location": model}
        pairs.append((name, ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)))
    return Facts(pairs)


def _metrics(title: str, file: Tuning, keys: Sequence[str], axis: str) -> Figure:
    series = [Line(key, 1 + index % 6, file.points[key], index) for index, key in enumerate(keys)]
    ends = listed([f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in series])
    return Figure(title, f"{ends}.", lines(series, "step", axis), [_numbers(title, file, keys)], _legend(series))


def _load(title: str, file: Tuning) -> Figure:
    experts = len(file.load[0][1])
    series = [
        Line(f"expert {index}", index % 7, [(step, load[index]) for step, load in file.load if len(load) == experts], index)
        for index in range(experts)
    ]
    ends = listed([f"{line.name} {100 * line.points[-1][1]:.0f}%" for line in series])
    columns = [Column("expert", numeric=True), Column("first", "%", numeric=True), Column("last", "%", numeric=True)]
    rows = [[count(i), percent(line.points[0][1], 1), percent(line.points[-1][1], 1)] for i, line in enumerate(series)]
    described = f"In the end: {ends}; an even share is {100 / experts:.0f}%."
    return Figure(title, described, lines(series, "step", "share of the choices"), [Table(title, columns, rows)], _legend(series))


def _legend(series: Sequence[Line]) -> list[Key]:
    return [Key(line.name, line.colour, line=True, dash=line.dash % 4) for line in series]


def _numbers(title: str, file: Tuning, keys: Sequence[str]) -> Table:
    columns = [Column("metric"), *(Column(name, numeric=True) for name in ("points", "first", "last", "smallest", "largest"))]
    rows = []
    for key in keys:
        y = [value for _, value in file.points[key]]
        rows.append([words(key), count(len(y)), *(number(value, 4) for value in (y[0], y[-1], min(y), max(y)))])
    return Table(title, columns, rows)
