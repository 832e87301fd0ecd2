"""The search itself: optuna proposes points, each is merged in memory and measured."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError
from moerge.merging.running import RunningMerge
from moerge.progress import Progress
from moerge.searching.objectives import Objective, Sums, Texts, summed
from moerge.searching.result import Trial, shown
from moerge.searching.settings import Choice, Range, Search
from moerge.searching.space import Space
from moerge.tensors.digest import file_digest
from moerge.texts import Document

if TYPE_CHECKING:
    import optuna

_PORTIONS = 4
"""Parts of the text after which a poor trial ends."""
_STATE = "moerge"
"""The attribute of studies and trials in which our records lie."""


@dataclass
class Study:
    """Trials of a space by objectives, in optuna's storage, so that several processes can add to it.

    The points of trial n depend on the seed, n and the trials before it, so that an interrupted search goes on as it would have.
    """

    space: Space
    objectives: Sequence[Objective]
    texts: Texts
    settings: Search
    storage: str
    progress: Progress
    running: RunningMerge = field(init=False)

    def __post_init__(self) -> None:
        self.running = RunningMerge(device=self.settings.device, dtype=self.settings.dtype)
        self._study = self._open()

    def run(self, trials: int, until: float | None) -> None:
        """Try points until there are `trials` of them that ended, or the clock (of `time.monotonic`) says `until`."""
        done = len(self.trials())
        advance = self.progress.phase("trials", trials, "steps")
        advance(min(done, trials))
        while done < trials and (until is None or time.monotonic() < until):
            self._one(first=not done)
            now = len(self.trials())
            advance(max(0, min(now, trials) - min(done, trials)))
            done = now

    def trials(self) -> list[Trial]:
        """All trials that ended, of this process and others."""
        records = [trial.user_attrs.get(_STATE) for trial in self._study.get_trials(deepcopy=False)]
        return [Trial.model_validate_json(record) for record in records if record]

    def best(self) -> int:
        """The number of the best trial; of several objectives the one of the Pareto front with the best ranks on average."""
        complete = [trial for trial in self.trials() if trial.state == "complete"]
        if not complete:
            reasons = [trial.reason for trial in self.trials() if trial.reason]
            raise InputError(f"no trial came to its end{f': {reasons[-1]}' if reasons else ''}")
        ranks = {trial.number: 0 for trial in complete}
        for index in range(len(self.objectives)):
            ordered = sorted({(trial.values or [])[index] for trial in complete})
            for trial in complete:
                ranks[trial.number] += ordered.index((trial.values or [])[index])
        front = set(self.pareto())
        return min((rank, number) for number, rank in ranks.items() if number in front)[1]

    def pareto(self) -> list[int]:
        """Trials that no other beats in one objective without losing in another."""
        values = {trial.number: trial.values or [] for trial in self.trials() if trial.state == "complete"}

        def beaten(mine: list[float]) -> bool:
            return any(all(a <= b for a, b in zip(other, mine, strict=True)) and other != mine for other in values.values())

        return [number for number, mine in values.items() if not beaten(mine)]

    def importance(self) -> dict[str, float]:
        """The share of each parameter in what makes trials good, by PED-ANOVA (Watanabe et al. 2023); empty for few trials."""
        import optuna

        complete = [trial for trial in self._study.get_trials(deepcopy=False) if trial.values is not None]
        if len(complete) < 2 * max(2, len(self.space.kinds)):
            return {}
        with _quiet():
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            target = None if len(self.objectives) == 1 else lambda trial: float(trial.values[0])
            try:
                found = optuna.importance.get_param_importances(self._study, evaluator=evaluator, target=target)
            except (ValueError, RuntimeError):  # all trials alike
                return {}
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

    def _open(self) -> optuna.Study:
        import optuna

        name = self.settings.study or "moerge"
        with _quiet():
            try:
                storage = optuna.storages.RDBStorage(self.storage) if "://" in self.storage else None
                study = optuna.create_study(
                    storage=storage,
                    study_name=name,
                    load_if_exists=True,
                    directions=["minimize"] * len(self.objectives),
                    pruner=optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=0),
                )
            except Exception as error:  # SQLAlchemy, its drivers and optuna have no common one
                raise InputError(f"storage {self.storage}: {' '.join(str(error).split())[:200]}") from None
            theirs = study.user_attrs.get(_STATE)
            if theirs is not None and theirs != self._identity():
                raise InputError(
                    f"storage {self.storage}: the study {name!r} is of another search: name another 'study' or 'storage'"
                )
            study.set_user_attr(_STATE, self._identity())
            start = self._encoded(self.space.start())
            if theirs is None and start:
                study.enqueue_trial(start)
        return study

    def _identity(self) -> str:
        kinds = {name: kind.model_dump(mode="json") for name, kind in self.space.kinds.items()}
        texts = [self.texts.searched, self.texts.judged]
        metrics = [(objective.metric, objective.domains) for objective in self.objectives]
        content = [self.space.recipe, kinds, texts, metrics, self.settings.seed, self.settings.sampler, self.settings.dtype]
        return file_digest(json.dumps(content, sort_keys=True, default=str).encode())

    def _encoded(self, point: Mapping[str, Any]) -> dict[str, Any]:
        return {name: json.dumps(value) if isinstance(self.space.kinds[name], Choice) else value for name, value in point.items()}

    def _one(self, *, first: bool) -> None:
        import optuna

        with _quiet():
            number = len(self._study.get_trials(deepcopy=False))
            self._study.sampler = self._sampler(number)
            trial = self._study.ask()
            point = {name: _suggest(trial, name, kind) for name, kind in self.space.kinds.items()}
        begun = time.perf_counter()
        states = optuna.trial.TrialState
        record = Trial(number=trial.number, state="failed", point=point)
        try:
            record = self._measured(record, trial)
        except InputError as error:
            if first:
                raise
            record = record.model_copy(update={"reason": str(error)})
        except KeyboardInterrupt:
            self._study.tell(trial, state=states.FAIL)
            raise
        record = record.model_copy(update={"seconds": round(time.perf_counter() - begun, 3)})
        trial.set_user_attr(_STATE, record.model_dump_json())
        state = {"complete": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[record.state]
        with _quiet():
            self._study.tell(trial, record.values if record.state == "complete" else None, state=state)

    def _measured(self, record: Trial, trial: optuna.Trial) -> Trial:
        plan = self.space.plan(record.point)
        reads = any(objective.domains for objective in self.objectives)
        loaded = self.running.load(plan, f"trial {record.number}") if reads else None
        totals: list[dict[str, Sums]] = [{} for _ in self.objectives]
        for step, part in enumerate(self._portions()):
            for index, objective in enumerate(self.objectives):
                rows = objective.rows(loaded, plan, part)  # type: ignore[arg-type]
                for name, value in summed(rows).items():
                    totals[index][name] = totals[index].get(name, Sums()) + value
            values = [self._value(objective, sums) for objective, sums in zip(self.objectives, totals, strict=True)]
            if len(values) == 1 and self.settings.prune and step + 1 < _PORTIONS:
                trial.report(values[0], step)
                if trial.should_prune():
                    return record.model_copy(update={"state": "pruned", "merged": self.running.merged})
        figures = {
            objective.metric: {name: value.figure for name, value in sums.items()}
            for objective, sums in zip(self.objectives, totals, strict=True)
        }
        update = {"state": "complete", "values": values, "figures": figures, "merged": self.running.merged}
        return record.model_copy(update=update)

    def _value(self, objective: Objective, sums: Mapping[str, Sums]) -> float:
        value = objective.combine({name: total.figure for name, total in sums.items()})
        if not math.isfinite(value):
            raise InputError(f"the merge gives no finite {objective.metric}")
        return value

    def _portions(self) -> Iterator[dict[str, Sequence[Document]]]:
        """Parts of the texts that have a document of each."""
        least = min((len(texts) for texts in self.texts.searched.values()), default=1)
        parts = min(_PORTIONS, least)
        for part in range(parts):
            yield {name: texts[part::parts] for name, texts in self.texts.searched.items()}

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        seed, kind = (self.settings.seed * 1_000_003 + number) % 2**32, self.settings.sampler
        if kind == "auto":
            kind = "tpe" if len(self.objectives) == 1 else "nsga2"
        if kind == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if kind == "nsga2":
            population = max(4, min(50, self.settings.trials // 4))
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        if kind == "cmaes":
            return optuna.samplers.CmaEsSampler(seed=seed, x0=None, warn_independent_sampling=False)
        startup = max(2, min(10, self.settings.trials // 4))
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True)


def _suggest(trial: optuna.Trial, name: str, kind: Range | Choice) -> Any:
    if isinstance(kind, Choice):
        return json.loads(trial.suggest_categorical(name, [json.dumps(value) for value in kind.choice]))
    least, greatest = kind.range
    if isinstance(least, int) and isinstance(greatest, int):
        return trial.suggest_int(name, least, greatest, step=int(kind.step or 1), log=kind.log)
    return round(trial.suggest_float(name, least, greatest, step=kind.step, log=kind.log), 6)


@contextmanager
def _quiet() -> Iterator[None]:
    """While optuna works: its remarks on experimental parts are not for our users."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def describe(record: Trial) -> str:
    """A trial on a line."""
    values = ", ".join(f"{value:.5g}" for value in record.values or [])
    return f"trial {record.number}: {values or record.state} at {shown(record.point)}"


def storage_of(folder: Path, settings: Search) -> str:
    """The storage of a search: the one it names, else a file in its folder."""
    return settings.storage or f"sqlite:///{folder / 'search.db'}"
