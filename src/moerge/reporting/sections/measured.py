"""Measurements: benchmarks and held-out text with their errors, and the demo's table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import yaml

from moerge.formatting import listed, plural, short_names
from moerge.reporting.blocks import (
    Block,
    Cell,
    Code,
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
    words,
)
from moerge.reporting.data import Collected, Difference, Evaluation, Score
from moerge.reporting.sections.demo import demo, demo_glance
from moerge.reporting.svg import Dot, dots

_ENOUGH = 20
"""Documents below which a bootstrap over them is known to give intervals that are too short."""
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "nats_per_byte")
_DRAWN = ("exact_match", "pass@1", "bits_per_byte")
_UNITS = {"exact_match": ("exact match", "%"), "pass@1": ("pass@1", "%")}
_UNITS |= {
    "bits_per_byte": ("bits per byte", "bits"),
    "nats_per_byte": ("nats per byte", "nats"),
    "perplexity": ("perplexity", ""),
}


def measured(found: Collected) -> Section | None:
    """Figures and tables of all evaluations."""
    blocks: list[Block] = []
    glance: list[str] = []
    for evaluation in found.evaluations:
        if len(found.evaluations) + len(found.demos) > 1:
            blocks.append(Heading(evaluation.path))
        names = short_names(evaluation.checkpoints)
        blocks += list(_evaluation(evaluation, names))
        glance += _glance(evaluation, names)
    for file in found.demos:
        blocks += demo(file)
        glance += [] if found.evaluations else demo_glance(file)
    return Section("evaluation", "What was measured", blocks, glance) if blocks else None


def _evaluation(evaluation: Evaluation, names: Mapping[str, str]) -> Iterator[Block]:
    for kind, title in (("benchmark", "Benchmarks: higher is better"), ("text", "Held-out text: lower is better")):
        scores = [score for score in evaluation.scores if score.kind == kind]
        if scores:
            yield _figures(title, scores, evaluation, names)
            yield _overview(scores, evaluation, names)
    if evaluation.differences:
        yield _differences(evaluation, names)
    few = min((score.documents for score in evaluation.scores), default=_ENOUGH)
    if few < _ENOUGH:
        yield Text(
            f"Some figures are over {plural(few, 'document')}: the bootstrap's intervals are too short for so few.", "warning"
        )
    yield from (Text(warning, "warning") for measure in evaluation.measures for warning in measure.warnings)
    yield Fold("All figures", [_all(evaluation, names)])
    if evaluation.settings:
        settings = yaml.safe_dump(dict(evaluation.settings), sort_keys=False, allow_unicode=True)
        yield Fold("Settings", [Code(settings, "The settings, as YAML")])
    yield Fold("When it was measured", [_times(evaluation, names)])


def _value(score: Score, value: float | None) -> float | None:
    """In the unit that is shown."""
    return value if value is None or _unit(score.metric)[1] != "%" else 100 * value


def _unit(metric: str) -> tuple[str, str]:
    return _UNITS.get(metric, (metric, ""))


def _digits(score: Score) -> int:
    return 1 if _unit(score.metric)[1] == "%" else 2 if score.metric == "perplexity" else 4


def _with_error(score: Score) -> str:
    error = f" ± {_value(score, score.standard_error):.{_digits(score)}f}" if score.standard_error is not None else ""
    return f"{_value(score, score.value):.{_digits(score)}f}{error}"


def _figures(title: str, scores: Sequence[Score], evaluation: Evaluation, names: Mapping[str, str]) -> Grid:
    """A figure for each benchmark or text, with a dot for each checkpoint."""
    groups: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        if score.metric in _DRAWN or not any(other.metric in _DRAWN for other in scores):
            groups.setdefault((score.on, score.metric), []).append(score)
    first = evaluation.checkpoints[0]
    figures = []
    for (on, metric), found in groups.items():
        name, unit = _unit(metric)
        axis = f"{name}, {unit}" if unit and unit not in name else name
        points = [_dot(score, names, 0 if score.checkpoint == first else 1) for score in found]
        reference = next(
            ((_value(score, score.value) or 0.0, names[first]) for score in found if score.checkpoint == first), None
        )
        spoken = ", ".join(f"{names.get(score.checkpoint, score.checkpoint)} {_with_error(score)}" for score in found)
        caption = f"{on} (n = {found[0].documents:,})"
        figures.append(Figure(caption, f"{axis}: {spoken}.", dots(points, axis, reference=reference if len(found) > 1 else None)))
    legend = [Key(f"{names[first]}, what the others are compared with", 0), Key("the others", 1)]
    note = "Bars are 95% intervals over documents; n is their number. To compare two models, use their paired differences below: "
    note += "intervals that overlap can hide a clear difference on the same documents."
    return Grid(title, figures, legend if len(evaluation.checkpoints) > 1 else [], note=note)


def _dot(score: Score, names: Mapping[str, str], colour: int) -> Dot:
    value, low, high = (_value(score, end) for end in (score.value, score.low, score.high))
    assert value is not None
    note = _with_error(score)
    return Dot(
        names.get(score.checkpoint, score.checkpoint),
        note,
        colour,
        value,
        value if low is None else low,
        value if high is None else high,
    )


def _overview(scores: Sequence[Score], evaluation: Evaluation, names: Mapping[str, str]) -> Table:
    """A row for each checkpoint, a column for each figure, with its standard error."""
    keys = list(dict.fromkeys((score.on, score.metric) for score in scores))
    by_place = {(score.checkpoint, score.on, score.metric): score for score in scores}
    columns = [Column("model")]
    for on, metric in keys:
        name, unit = _unit(metric)
        columns.append(Column(f"{on}: {name}", unit if unit == "%" else "", numeric=True))
    best = {key: _best([score for score in scores if (score.on, score.metric) == key]) for key in keys}
    rows = []
    for checkpoint in evaluation.checkpoints:
        cells = []
        for key in keys:
            score = by_place.get((checkpoint, *key))
            tone = "best" if score is not None and score.value == best[key] else ""
            cells.append(Cell("–", None, "quiet") if score is None else Cell(_with_error(score), score.value, tone))
        rows.append([words(names[checkpoint]), *cells])
    return Table("Figures ± standard errors", columns, rows, "Bold: the best of a column, whether or not it is clearly the best.")


def _best(scores: Sequence[Score]) -> float:
    values = [score.value for score in scores]
    return min(values) if scores[0].metric in _LOWER_IS_BETTER else max(values)


def _judged(difference: Difference) -> str:
    """Judge a difference: the interval decides, not the value."""
    if difference.low is None or difference.high is None:
        return "one document: not known"
    if difference.low <= 0 <= difference.high:
        return "not clear"
    return "better" if (difference.value < 0) == (difference.metric in _LOWER_IS_BETTER) else "worse"


_TONES = {"better": "good", "worse": "apart"}


def _differences(evaluation: Evaluation, names: Mapping[str, str]) -> Table:
    columns = [Column("model"), Column("against"), Column("on"), Column("metric"), Column("difference", numeric=True)]
    columns += [Column("standard error", numeric=True), Column("from", numeric=True), Column("to", numeric=True)]
    columns += [Column("verdict"), Column("documents", numeric=True)]
    rows = []
    for difference in evaluation.differences:
        name, unit = _unit(difference.metric)
        digits = _digits(difference)
        ends = (difference.value, difference.standard_error, difference.low, difference.high)
        verdict = _judged(difference)
        rows.append(
            [
                words(names.get(difference.checkpoint, difference.checkpoint)),
                words(names.get(difference.against, difference.against)),
                words(difference.on),
                words(f"{name}, {unit}" if unit == "%" else name),
                *(number(_value(difference, end), digits) for end in ends),
                words(verdict, _TONES.get(verdict, "")),
                count(difference.documents),
            ]
        )
    note = (
        "Paired: both models on the same documents, the errors by bootstrap over documents. From and to are the 95% interval; a "
    )
    note += "difference is better or worse where that leaves out 0. Of many comparisons, one in twenty looks clear by chance."
    return Table("Differences", columns, rows, note)


def _all(evaluation: Evaluation, names: Mapping[str, str]) -> Table:
    columns = [Column("model"), Column("on"), Column("metric"), Column("value", numeric=True)]
    columns += [Column("standard error", numeric=True), Column("from", numeric=True), Column("to", numeric=True)]
    columns += [Column("documents", numeric=True)]
    rows = []
    for score in evaluation.scores:
        name, unit = _unit(score.metric)
        ends = (score.value, score.standard_error, score.low, score.high)
        cells = [number(_value(score, end), _digits(score)) for end in ends]
        label = f"{name}, {unit}" if unit == "%" else name
        rows.append(
            [words(names.get(score.checkpoint, score.checkpoint)), words(score.on), words(label), *cells, count(score.documents)]
        )
    return Table("All figures, with 95% intervals", columns, rows)


def _times(evaluation: Evaluation, names: Mapping[str, str]) -> Table:
    columns = [Column("model"), Column("on"), Column("started"), Column("took", "s", numeric=True)]
    rows = [
        [words(names.get(m.checkpoint, m.checkpoint)), words(m.on), words(m.started), number(m.seconds, 1)]
        for m in evaluation.measures
    ]
    return Table("When it was measured", columns, rows)


def _glance(evaluation: Evaluation, names: Mapping[str, str]) -> list[str]:
    judged = [_judged(difference) for difference in evaluation.differences]
    if not judged:
        return [
            f"{listed([f'`{name}`' for name in names.values()])} was measured." if len(names) == 1 else "Models were measured."
        ]
    better, worse = judged.count("better"), judged.count("worse")
    against = names.get(evaluation.differences[0].against, evaluation.differences[0].against)
    counted = f"{better} clearly better, {worse} clearly worse, {len(judged) - better - worse} not clear (95% intervals)"
    return [f"{plural(len(judged), 'paired difference')} from `{against}`: {counted}."]
