"""Measured figures in a checkpoint's model card: a section between two comments, and the Hub's `model-index`.

A merge runs no model, so its card holds no figures; this adds them later. What stands outside of the two comments stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moerge.checkpoint.manifest import read_manifest, sealed
from moerge.checkpoint.source_cards import CARD
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.evaluation.result import Difference, Evaluation, Score
from moerge.files import atomic_path, read_file
from moerge.inference.result import Routes
from moerge.reporting.data import Checkpoint, Collected
from moerge.tensors.digest import file_digest

BEGIN, END = "<!-- moerge: measured -->", "<!-- moerge: end of measured -->"
_METADATA = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
_USE = "\n## Use\n"
_SHARES = ("exact_match", "pass@1")


@dataclass(frozen=True)
class Measured:
    """The measurements of one checkpoint: figures, paired differences, and routing."""

    scores: tuple[Score, ...] = ()
    differences: tuple[Difference, ...] = ()
    routes: tuple[Routes, ...] = ()
    made: str = ""
    """When and with which versions."""


@dataclass(frozen=True)
class CardUpdate:
    """A card that is about to be written. `warning` says that it was edited by hand before, or is empty."""

    folder: Path
    card: bytes
    manifest: bytes
    warning: str = ""


def write_card(update: CardUpdate) -> None:
    """Replace the card, and its digest in the manifest. Raises InputError where they cannot be written."""
    try:
        for name, content in ((CARD, update.card), (MANIFEST, update.manifest)):
            with atomic_path(update.folder / name) as beside:
                beside.write_bytes(content)
    except OSError as error:
        raise InputError(f"cannot write the model card in {update.folder}: {error.strerror or error}") from None


def updates(top: Path, found: Collected) -> tuple[CardUpdate, ...]:
    """A new card for each checkpoint in `top` that something was measured of; nothing is written yet.

    Results belong to the checkpoint whose tensors have the digest that they name, wherever it lies. Raises InputError where no
    result belongs to a checkpoint there, and for a card that cannot be read.
    """
    made = []
    for checkpoint in found.checkpoints:
        measured = measured_of(checkpoint, found)
        if measured.scores or measured.routes:
            made.append(updated(top / checkpoint.folder, measured))
    if not made:
        raise InputError(
            f"no result below {top} is of a checkpoint there, so no model card can be updated: measure one with "
            "`moerge eval CHECKPOINT ... --out DIR`, again if it was merged again"
        )
    return tuple(made)


def measured_of(checkpoint: Checkpoint, found: Collected) -> Measured:
    """The results of a checkpoint; of figures that were measured more than once the latest."""
    scores: dict[tuple[str, str], tuple[str, Score]] = {}
    differences: dict[tuple[str, str, str], tuple[str, Difference]] = {}
    made: dict[str, str] = {}
    for evaluation in found.evaluations:
        names = {name for name in evaluation.checkpoints if evaluation.digests.get(name) == checkpoint.digest}
        for measure in evaluation.measures:
            for score in measure.scores if measure.checkpoint in names else ():
                place = (score.on, score.metric)
                scores[place] = max(scores.get(place, ("", score)), (measure.started, score), key=lambda entry: entry[0])
                made[evaluation.path] = f"{measure.started[:10]}, {_versions(evaluation)}"
        times = {measure.on: measure.started for measure in evaluation.measures if measure.checkpoint in names}
        for row in evaluation.differences if names else ():
            if row.checkpoint in names:
                entry = (times.get(row.on, ""), row)
                key = (row.on, row.metric, row.against)
                differences[key] = max(differences.get(key, entry), entry, key=lambda kept: kept[0])
    routes = tuple(route for route in found.routes if route.digest == checkpoint.digest)
    return Measured(
        tuple(score for _, score in scores.values()),
        tuple(row for _, row in differences.values()),
        routes,
        "; ".join(dict.fromkeys(made.values())),
    )


def _versions(evaluation: Evaluation) -> str:
    return ", ".join(f"{name} {number}" for name, number in evaluation.versions.items())


def updated(folder: Path, measured: Measured) -> CardUpdate:
    """The card of a checkpoint with what was measured, and the manifest with the card's digest."""
    path, manifest = folder / CARD, read_manifest(folder)
    assert manifest is not None  # or it would not have been found
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{path} is missing, or a link: merge again to have a model card")
    try:
        before = read_file(path)
        text = before.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as text: {error}") from None
    edited = manifest["files"].get(CARD) != file_digest(before)
    card = with_metadata(with_section(text, section(measured), path), folder.resolve().name, measured.scores, path).encode()
    manifest["files"] = {**manifest["files"], CARD: file_digest(card)}
    note = f"{path} was changed after the merge: its text stays as it is, and `moerge verify` takes it as right from now on"
    return CardUpdate(folder, card, sealed(manifest), note if edited else "")


def section(measured: Measured) -> str:
    """The part of the card between the two comments."""
    parts = [BEGIN, "## Measured", *_figures(measured), *_differences(measured), *_routes(measured)]
    return "\n\n".join([*parts, END])


def _figures(measured: Measured) -> Iterator[str]:
    if not measured.scores:
        return
    rows = ["| on | metric | value | standard error | 95% interval | documents |", "|---|---|---:|---:|---|---:|"]
    for score in measured.scores:
        interval = (
            "" if score.low is None or score.high is None else f"{_figure(score, score.low)} to {_figure(score, score.high)}"
        )
        error = "" if score.standard_error is None else _figure(score, score.standard_error)
        cells = [_plain(score.on), _plain(score.metric), _figure(score, score.value), error, interval, f"{score.documents:,}"]
        rows.append(f"| {' | '.join(cells)} |")
    yield "\n".join(rows)
    yield f"Measured with `moerge eval`: {_plain(measured.made)}."


def _differences(measured: Measured) -> Iterator[str]:
    if not measured.differences:
        return
    rows = ["| on | against | metric | difference | 95% interval |", "|---|---|---|---:|---|"]
    for row in measured.differences:
        interval = "" if row.low is None or row.high is None else f"{_figure(row, row.low)} to {_figure(row, row.high)}"
        against = row.against.rstrip("/").rpartition("/")[2] or row.against
        rows.append(f"| {_plain(row.on)} | {_plain(against)} | {_plain(row.metric)} | {_figure(row, row.value)} | {interval} |")
    yield "Paired differences on the same documents:"
    yield "\n".join(rows)


def _routes(measured: Measured) -> Iterator[str]:
    if not measured.routes:
        return
    route = measured.routes[-1]
    rows = [
        f"| text | documents | {' | '.join(map(_plain, route.experts))} | accuracy |",
        f"|---|---:|{'---:|' * len(route.experts)}---:|",
    ]
    for name, text in route.texts.items():
        shares = [f"{100 * text.alpha[expert]:.0f}%" for expert in route.experts]
        accuracy = "" if text.accuracy is None else f"{100 * text.accuracy:.0f}%"
        rows.append(f"| {' | '.join([_plain(name), f'{text.documents:,}', *shares, accuracy])} |")
    yield (
        f"Where texts go, mean weight of each expert by `moerge route` ({_plain(route.level)}-routed; accuracy: how often the "
        "text's own expert comes first):"
    )
    yield "\n".join(rows)


def _figure(score: Score, value: float) -> str:
    return f"{100 * value:.1f}%" if score.metric in _SHARES else f"{value:.4g}"


def _plain(text: str) -> str:
    """Text that is no markup in Markdown: it may come from a file of results."""
    escaped = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def with_section(text: str, new: str, path: Path) -> str:
    """The card with its measured section replaced, or put before how to use the model, or at the end."""
    match = _METADATA.match(text)
    head, body = (match[0], text[match.end() :]) if match else ("", text)
    counts = (body.count(BEGIN), body.count(END))
    if counts == (1, 1) and body.index(BEGIN) < body.index(END):
        return head + body[: body.index(BEGIN)] + new + body[body.index(END) + len(END) :]
    if counts != (0, 0):
        raise InputError(f"{path} should have {BEGIN} and {END} once each: remove what is left of them, and try again")
    before, use, after = body.rpartition(_USE)
    return head + (f"{before}\n{new}\n{use}{after}" if use else f"{body.rstrip()}\n\n{new}\n")


def with_metadata(text: str, name: str, scores: Sequence[Score], path: Path) -> str:
    """The card with the Hub's `model-index` in its metadata, as huggingface_hub writes and reads it."""
    from huggingface_hub import ModelCard

    match = _METADATA.match(text)
    try:
        held = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        held = None
    if not isinstance(held, dict):
        raise InputError(f"{path}: the metadata between its first two lines of --- is no YAML mapping: mend it, and try again")
    held.pop("model-index", None)
    if scores:
        held["model-index"] = model_index(name, scores)
    written = yaml.safe_dump(held, sort_keys=False, allow_unicode=True)
    card = (f"---\n{written}---\n" if held else "") + (text[match.end() :] if match else text)
    try:
        ModelCard(card)
    except ValueError as error:
        raise InputError(f"{path}: the Hub's library does not read its metadata ({error}): mend it, and try again") from None
    return card


def model_index(name: str, scores: Sequence[Score]) -> list[dict[str, Any]]:
    """The Hub's list of evaluation results."""
    from huggingface_hub import EvalResult, repocard_data

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w.-]+", "-", score.on).strip("-") or "text",
            dataset_name=" ".join(score.on.split()) + (" (held-out text)" if score.kind == "text" else ""),
            metric_type=score.metric,
            metric_value=float(f"{score.value:.6g}"),
            metric_name=score.metric.replace("_", " "),
            metric_args=_arguments(score),
        )
        for score in scores
    ]
    found: list[dict[str, Any]] = repocard_data.eval_results_to_model_index(name, results)
    return found


def _arguments(score: Score) -> dict[str, Any]:
    error = {} if score.standard_error is None else {"standard_error": float(f"{score.standard_error:.6g}")}
    return {"documents": score.documents, **error}
