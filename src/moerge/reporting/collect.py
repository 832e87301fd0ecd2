"""From a folder to what a report shows: `collect` finds the files, knows each by what it holds, and checks it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from moerge.checkpoint.manifest import read_manifest, weights_digest
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.inspection import inspect
from moerge.learning.coefficient_figure import table as coefficient_table
from moerge.recipe.coefficients import read_coefficients
from moerge.reporting import data
from moerge.reporting.find import Source, plain, sources


def collect(top: Path) -> data.Collected:
    """Everything in a folder that a report can show; `warnings` name what was left out. Raises InputError if there is nothing."""
    warnings: list[str] = []
    found: dict[str, list[data.File]] = {kind: [] for kind in _READERS}
    for source in sources(top, warnings):
        kind = _kind(source)
        if kind is None:
            continue
        try:
            read = _READERS[kind](source)
        except ValidationError as error:
            warnings.append(f"{source.path} was left out: {_first(error)}")
        except InputError as error:
            warnings.append(f"{source.path} was left out: {error}")
        else:
            found[kind].append(read)
    if not any(found.values()):
        more = f" ({warnings[0]})" if warnings else ""
        raise InputError(
            f"{top} holds nothing to report on{more}: name a folder with a merged checkpoint, or with what `moerge route`, "
            "`moerge compare` or `moerge eval` wrote with --out"
        )
    found["learnings"] = _whole(found["learnings"])
    warnings += _stale(top, found)
    return data.Collected(folder=plain(top.resolve().name) or "/", warnings=tuple(map(plain, warnings)), **found)  # type: ignore[arg-type]


def _kind(source: Source) -> str | None:
    """By name where a name says it, by its keys where several commands use one; None for what others may have written."""
    name, held = Path(source.path).name, source.data
    if name == MANIFEST:
        return "checkpoints"
    if name in ("coefficients.json", "learning.csv"):
        return "learnings"
    if isinstance(held, list):
        return "tunings" if name.endswith(".jsonl") else None
    keys = set(held) if isinstance(held, dict) else set()
    return next((kind for kind, needed in _KEYS.items() if needed <= keys), None)


_KEYS = {
    "comparisons": {"advice", "verdicts", "pairs", "rows"},
    "routes": {"level", "experts", "texts"},
    "evaluations": {"checkpoints", "measures", "differences"},
    "demos": {"seed", "models", "seconds"},
    "tuned": {"settings", "sources", "versions"},
}
_MOST_STEPS = 400
"""Points of a curve; of longer ones every n-th is taken, and the last."""


def _checkpoint(source: Source) -> data.File:
    manifest = read_manifest(source.folder) or {}
    digest = weights_digest(manifest)
    manifest = plain(manifest)
    about = inspect(source.folder)
    facts = plain(about.to_json())
    own = {key: facts[key] for key in ("parameters", "bytes", "dtypes", "layers", "hidden_size", "roles")}
    routing = about.checkpoint.config.get("routing")
    own |= {"routing": plain(routing) if isinstance(routing, dict) else None, "digest": digest}
    return _checked(data.Checkpoint, source, {**manifest, **own, "model_type": facts["model_type"] or "unknown"})


def _learning(source: Source) -> data.File:
    if isinstance(source.data, list):
        stages: dict[str, list[Mapping[str, Any]]] = {}
        for row in source.data:
            stages.setdefault(str(row.get("stage")), []).append({key: value or None for key, value in row.items()})
        return _checked(data.Learning, source, {"stages": [{"updates": rows} for rows in stages.values()]})
    found = read_coefficients(source.folder / Path(source.path).name)
    learning = plain(dict(found.learning))
    settings = learning.get("settings")
    held = {
        **plain(coefficient_table(found).model_dump(mode="json")),
        "objective": settings.get("objective", "") if isinstance(settings, dict) else "",
        "stages": learning.get("stages", []),
    }
    return _checked(data.Learning, source, held)


def _whole(learnings: list[data.File]) -> list[data.File]:
    """Without the curves that the coefficients in the same folder have too."""
    named = {file.folder for file in learnings if file.path.endswith(".json")}
    return [file for file in learnings if file.path.endswith(".json") or file.folder not in named]


def _stale(top: Path, found: Mapping[str, Sequence[Any]]) -> Iterator[str]:
    """Results of a checkpoint that was merged again since; by where they say it lies, which is compared and not opened."""
    now = {os.path.abspath(top / checkpoint.folder): checkpoint.digest for checkpoint in found["checkpoints"]}
    measured = [(route.path, route.checkpoint, route.digest) for route in found["routes"]]
    for evaluation in found["evaluations"]:
        measured += [(evaluation.path, name, digest) for name, digest in evaluation.digests.items()]
    for path, name, digest in measured:
        if digest is not None and now.get(os.path.abspath(name), digest) != digest:
            yield f"{path} is about {name} before it was merged again: measure it again"


def _tuning(source: Source) -> data.File:
    rows = [row for row in source.data if isinstance(row, dict) and isinstance(row.get("step"), int | float)]
    every = max(1, -(-len(rows) // _MOST_STEPS))
    kept = [row for index, row in enumerate(rows) if index % every == 0 or index == len(rows) - 1]
    points: dict[str, list[tuple[float, float]]] = {}
    load = []
    for row in kept:
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(key, []).append((row["step"], value))
        if isinstance(row.get("load"), list):
            load.append((row["step"], _over_layers(row["load"])))
    if not points:
        raise InputError("no line has a step and a number")
    return _checked(data.Tuning, source, {"steps": len(rows), "every": every, "points": points, "load": load})


def _over_layers(load_LE: Any) -> list[float]:
    try:
        return [sum(column) / len(load_LE) for column in zip(*load_LE, strict=True)]
    except TypeError:
        raise InputError("a line's load is no table of layers and experts") from None


def _checked(kind: type[data.File], source: Source, held: Any) -> data.File:
    return kind.model_validate({**held, "path": source.path, "written": source.written})


def _as(kind: type[data.File]) -> Callable[[Source], data.File]:
    return lambda source: _checked(kind, source, source.data)


_READERS: dict[str, Callable[[Source], data.File]] = {
    "checkpoints": _checkpoint,
    "comparisons": _as(data.ComparisonFile),
    "routes": _as(data.RouteFile),
    "learnings": _learning,
    "tunings": _tuning,
    "tuned": _as(data.Tuned),
    "evaluations": _as(data.EvaluationFile),
    "demos": _as(data.DemoFile),
}


def _first(error: ValidationError) -> str:
    """The first problem in one line: where, and what."""
    problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))[:120]
    what = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what
