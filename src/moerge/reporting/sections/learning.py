"""Learned coefficients and learning curves, and the metrics of fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from moerge.figures import lines
from moerge.formatting import listed, short_names
from moerge.learning.coefficient_figure import draw
from moerge.reporting.blocks import (
    Block,
    Code,
    Column,
    Facts,
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
from moerge.reporting.data import Collected, Learning, Tuned, Tuning


def learning(found: Collected) -> Section | None:
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
        columns = {"training": [row.train for row in stage.updates], "held out": [row.heldout for row in stage.updates]}
        series = {
            label: [(row.update, value) for row, value in zip(stage.updates, values, strict=True) if value is not None]
            for label, values in columns.items()
            if any(value is not None for value in values)
        }
        if not series:
            continue
        kept = f"; update {stage.best_update} was kept" if stage.best_update is not None else ""
        early = ", stopped early" if stage.stopped_early else ""
        stages = f", stage {index}" if len(file.stages) > 1 else ""
        objective = f" ({file.objective})" if file.objective else ""
        title = f"{name}{stages}: the objective{objective} after each update{kept}{early}"
        heading = [Column("update", numeric=True), *(Column(label, numeric=True) for label in columns)]
        rows = [[count(row.update), number(row.train, 4), number(row.heldout, 4)] for row in stage.updates]
        table = Table(f"{name}: the curve", heading, rows)
        yield Figure(title, f"The objective: {_ends(series)}.", partial(lines, series, "update", "objective"), [table])


def _ends(series: Series) -> str:
    return listed([f"{name} from {points[0][1]:.4g} to {points[-1][1]:.4g}" for name, points in series.items()])


def _coefficients(name: str, file: Learning) -> list[Block]:
    """A table for each expert; the ground of a cell is the deeper the larger its coefficient."""
    values = [value for grid in file.coefficients.values() for row in grid for value in row if value is not None]
    highest = max(map(abs, values), default=1.0) or 1.0
    tables: list[Table] = []
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
    title = f"{name}: mean coefficient of each tensor by layer"
    means = listed([f"{expert} {mean:.2f}" for expert, mean in file.means.items()])
    figure = Figure(title, f"Means: {means}.", partial(draw, file), tables)
    return [Fold(f"{name}: coefficients by layer", [figure, Text(note, "note")])] if tables else []


Series = Mapping[str, Sequence[tuple[float, float]]]
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
    series = {key: file.points[key] for key in keys}
    return Figure(title, f"{_ends(series)}.", partial(lines, series, "step", axis), [_numbers(title, file, keys)])


def _load(title: str, file: Tuning) -> Figure:
    experts = len(file.load[0][1])
    series = {f"expert {i}": [(step, load[i]) for step, load in file.load if len(load) == experts] for i in range(experts)}
    ends = listed([f"{name} {100 * points[-1][1]:.0f}%" for name, points in series.items()])
    columns = [Column("expert", numeric=True), Column("first", "%", numeric=True), Column("last", "%", numeric=True)]
    rows = [[count(i), percent(y[0][1], 1), percent(y[-1][1], 1)] for i, y in enumerate(series.values())]
    described = f"In the end: {ends}; an even share is {100 / experts:.0f}%."
    return Figure(title, described, partial(lines, series, "step", "share of the choices"), [Table(title, columns, rows)])


def _numbers(title: str, file: Tuning, keys: Sequence[str]) -> Table:
    columns = [Column("metric"), *(Column(name, numeric=True) for name in ("points", "first", "last", "smallest", "largest"))]
    rows = []
    for key in keys:
        y = [value for _, value in file.points[key]]
        rows.append([words(key), count(len(y)), *(number(value, 4) for value in (y[0], y[-1], min(y), max(y)))])
    return Table(title, columns, rows)
