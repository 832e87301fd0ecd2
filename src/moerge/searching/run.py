"""`moerge search` as a function."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from moerge.checkpoint.manifest import to_json
from moerge.errors import InputError
from moerge.evaluation.bootstrap import bootstrap
from moerge.extras import require
from moerge.files import atomic_write, target_of
from moerge.merging.running import RunningMerge
from moerge.progress import Progress, reporter
from moerge.searching.objectives import Objective, Sums, check_calibration, objectives, read_search_texts
from moerge.searching.report import write_report
from moerge.searching.result import Judged, SearchResult
from moerge.searching.settings import SearchFile, load_search
from moerge.searching.space import Space, check_values, read_space, with_paths
from moerge.searching.study import Study, storage_of

RESULT, BEST, REPORT = "search.json", "best.yaml", "report.md"


def search(
    search: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    trials: int | None = None,
    hours: float | None = None,
    seed: int | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
) -> SearchResult:
    """Find the parameters of a recipe with which its merge does best, without writing a merge.

    `out` gets best.yaml (the winner, an ordinary recipe), search.json (all trials), report.md with figures, and search.db
    (optuna's storage, unless the search names another). Results are complete after every trial, so that Ctrl-C keeps the best.

    Args:
        search: SEARCH.yaml, or the same structure as a dict.
        out: A folder for results, which must not hold those of another search.
        trials: The number of trials, instead of the file's.
        hours: The longest time, instead of the file's.
        seed: Instead of the file's.
        resume: Go on with the search in `out`, to as many trials in all.
        progress: A `Progress`, or True for a display on standard error.

    Returns:
        Every trial, the winner, and how it does on text that was not searched on.

    Raises:
        InputError: The file, the recipe or a text is at fault; no trial came to its end; another search has the storage.
    """
    file = load_search(search, trials=trials, hours=hours, seed=seed)
    require("models", "searching")
    require("search", "searching", "optuna")
    folder = _folder(out, resume=resume, other_storage=file.settings.storage is not None)
    if resume and file.settings.sampler == "cmaes":
        raise InputError("CMA-ES keeps its state in the storage as a pickle, which is not loaded: search anew, or with tpe")
    begun = time.monotonic()
    space = read_space(file)
    check_values(space, file.document.error)
    given = space.given if file.settings.given is None else file.settings.given
    texts = read_search_texts(file, given)
    found = objectives(file, _places(space), given)
    check_calibration(file, space.own_plan(), texts)
    with reporter(progress) as report:
        folder.mkdir(parents=True, exist_ok=True)
        study = Study(space, found, texts, file.settings, storage_of(folder, file.settings), report)
        until = begun + 3600 * file.settings.hours if file.settings.hours else None
        try:
            study.run(file.settings.trials, until)
        except KeyboardInterrupt:
            if study.trials():
                _write(folder, file, space, study, _result(file, space, study, begun, judged=[], finished=False))
            raise
        report.info("judging the best on text that was not searched on")
        result = _result(file, space, study, begun, judged=list(_judge(space, study, found)), finished=True)
        _write(folder, file, space, study, result)
    return result


def _folder(out: str | Path, *, resume: bool, other_storage: bool) -> Path:
    folder = target_of(out)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: name another folder")
    holds = [name for name in (RESULT, "search.db") if (folder / name).exists()]
    if holds and not resume:
        raise InputError(f"{folder} holds a search already: go on with --resume, or name another folder", code="target-exists")
    if resume and not holds and not other_storage:
        raise InputError(f"{folder} holds no search to go on with: leave --resume out", code="not-found")
    return folder


def _places(space: Space) -> dict[str, str]:
    """The experts' places, for objectives that run them; those that are recipes or have adapters have none."""
    entries = space.recipe["experts"]
    named = {name: entry.get("model") if isinstance(entry, Mapping) else entry for name, entry in entries.items()}
    return {name: place for name, place in named.items() if isinstance(place, str)}


def _judge(space: Space, study: Study, found: Sequence[Objective]) -> Iterator[Judged]:
    """The winner and the recipe as it was, document by document, on the texts that judge."""
    running = RunningMerge(device=study.settings.device, dtype=study.settings.dtype)
    documents, winner = study.texts.judged, next(trial for trial in study.trials() if trial.number == study.best())
    asked = [objective for objective in found if objective.domains and set(objective.domains) <= documents.keys()]
    if not asked:
        return
    rows: dict[str, list[dict[str, list[Sums]]]] = {}
    for name, plan in (("the recipe as it was", space.own_plan()), ("best", space.plan(winner.point))):
        loaded = running.load(plan, name)
        rows[name] = [objective.rows(loaded, plan, documents) for objective in asked]
        for objective, mine, before in zip(asked, rows[name], rows["the recipe as it was"], strict=True):
            for domain in objective.domains:
                yield _judged(name, objective.metric, domain, mine[domain], before[domain])


def _judged(name: str, metric: str, domain: str, mine: Sequence[Sums], before: Sequence[Sums]) -> Judged:
    total = sum((one.total for one in mine), 0.0) / sum(one.count for one in mine)
    figures: dict[str, Any] = {}
    if mine is not before:
        values_N3 = np.array([[a.total - b.total, a.count] for a, b in zip(mine, before, strict=True)])
        estimate = bootstrap(lambda sums: sums[..., 0] / sums[..., 1], values_N3, seed=0)
        figures = {"difference": estimate.value, "low": estimate.low, "high": estimate.high}
    return Judged(name=name, metric=metric, domain=domain, documents=len(mine), value=total, **figures)


def _result(file: SearchFile, space: Space, study: Study, begun: float, *, judged: list[Judged], finished: bool) -> SearchResult:
    settings = file.settings
    return SearchResult(
        recipe=space.source,
        objectives=[objective.metric for objective in study.objectives],
        parameters={name: kind.model_dump(mode="json", exclude_defaults=True) for name, kind in space.kinds.items()},
        sampler=settings.sampler,
        seed=settings.seed,
        trials=study.trials(),
        best=study.best(),
        pareto=study.pareto(),
        importance=study.importance(),
        judged=judged,
        seconds=round(time.monotonic() - begun, 3),
        finished=finished,
    )


def _write(folder: Path, file: SearchFile, space: Space, study: Study, result: SearchResult) -> None:
    atomic_write(folder / RESULT, to_json(result.to_json()))
    atomic_write(folder / BEST, _recipe(space, result.winner.point, folder))
    for number in result.pareto if len(result.objectives) > 1 else ():
        point = next(trial.point for trial in result.trials if trial.number == number)
        atomic_write(folder / f"pareto-{number}.yaml", _recipe(space, point, folder))
    write_report(result, folder, REPORT)


def _recipe(space: Space, point: Mapping[str, Any], folder: Path) -> bytes:
    """A point as a recipe file in `folder`, whose paths start there."""
    recipe = with_paths(space.recipe_of(point), Path("/"), folder.absolute())
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
