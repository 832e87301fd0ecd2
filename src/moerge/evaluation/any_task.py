"""Any other task of lm-evaluation-harness, by the harness's own loop, model and metrics.

The harness's figure is shown. Where it is a mean over documents, errors and paired differences come from the documents too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moerge.errors import InputError, suggest
from moerge.evaluation.benchmarks import BENCHMARKS
from moerge.evaluation.bootstrap import Estimate, bootstrap
from moerge.evaluation.harness import quiet, require_harness
from moerge.evaluation.records import Records
from moerge.evaluation.result import Difference, Kind, Score
from moerge.runtime.loading import Loaded

Row = Mapping[str, Any]
Advance = Callable[[int], None]
_CLOSE = 1e-6
"""Of the harness's figure and a mean over its documents, where they are the same."""


@dataclass(frozen=True)
class HarnessTask:
    """A task or group of the harness by its name.

    `manager` knows all tasks, also the user's own; `shots` is None for the task's number.
    """

    kind: ClassVar[Kind] = "benchmark"
    name: str
    loaded: Mapping[str, Any]
    manager: Any
    limit: int | None
    shots: int | None
    batch_size: int
    seed: int

    @property
    def documents(self) -> int:
        """Return how many questions are asked."""
        return sum(min(len(task.eval_docs), self.limit or len(task.eval_docs)) for task in _tasks_of(self.loaded))

    def settings(self) -> dict[str, Any]:
        """Everything that decides what a model reads."""
        versions = {task.config.task: task.config.metadata for task in _tasks_of(self.loaded)}
        asked = {"limit": self.limit, "shots": self.shots, "documents": self.documents}
        return {"harness_task": self.name, "versions": versions, **asked}

    def measure(self, loaded: Loaded, records: Records, advance: Advance) -> tuple[list[Row], tuple[str, ...]]:
        """Ask the model, and take the harness's verdicts: a row for each question, then the harness's own figure."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        # the harness pads on the right without a mask, so that a batch would change how sequences are routed
        size = 1 if loaded.by_sequence else self.batch_size
        with _explained(self.name, loaded.name), quiet():
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=size)
            found = simple_evaluate(
                model=model,
                tasks=[self.name],
                task_manager=self.manager,
                num_fewshot=self.shots,
                limit=self.limit,
                bootstrap_iters=0,
                log_samples=True,
            )
        advance(self.documents)
        metric, figure = _main_figure(self.name, found["results"], found["samples"])
        rows: list[Row] = [
            {"document": index, "task": task, "metric": metric, "value": float(sample[metric])}
            for index, (task, sample) in enumerate(_samples(found["samples"], metric))
        ]
        rows.append({"document": None, "metric": metric, "value": figure})
        own = f"{self.name}: the harness's {metric} is no mean over questions, so it has no error here and no difference"
        return rows, () if _is_mean(_values(rows), figure) else (own,)

    def scores(self, checkpoint: str, rows: Sequence[Row]) -> tuple[Score, ...]:
        """The harness's figure, with the error of a bootstrap over questions where it is their mean."""
        values_N, figure = _values(rows), float(rows[-1]["value"])
        if _is_mean(values_N, figure):
            return (self._score(checkpoint, rows, bootstrap(_mean, _with_count(values_N), seed=self.seed)),)
        return (self._score(checkpoint, rows, Estimate(figure)),)

    def difference(self, checkpoint: str, rows: Sequence[Row], against: str, others: Sequence[Row]) -> Difference:
        """Return the first checkpoint's figure less the second's, question by question."""
        mine, theirs = (self.scores(checkpoint, one)[0] for one in (rows, others))
        found = Estimate(mine.value - theirs.value)
        if mine.standard_error is not None and theirs.standard_error is not None:
            values_N = np.array([a - b for a, b in zip(_values(rows), _values(others), strict=True)])
            found = bootstrap(_mean, _with_count(values_N), seed=self.seed)
        return Difference(**dict(self._score(checkpoint, rows, found)), against=against)

    def _score(self, checkpoint: str, rows: Sequence[Row], found: Estimate) -> Score:
        metric, documents = str(rows[-1]["metric"]), len(rows) - 1
        return Score(checkpoint=checkpoint, kind=self.kind, on=self.name, metric=metric, documents=documents, **vars(found))


def harness_tasks(names: Sequence[str], folder: Path | None, **settings: Any) -> Iterator[HarnessTask]:
    """Tasks of the harness, with their data. Raises InputError for an unknown name, and where the data cannot be had."""
    if not names:
        return
    require_harness()
    manager = _manager(folder)
    for name in names:
        if name not in manager.all_tasks:
            near = suggest(name, [*BENCHMARKS, *manager.all_tasks])
            near = near if near.startswith("did you") else "`lm_eval ls tasks` lists them"
            raise InputError(f"--tasks: there is no benchmark {name!r}: {near}", code="unknown-name")
        with _explained(name, ""), quiet():
            loaded = manager.load([name])["tasks"] if hasattr(manager, "load") else manager.load_task_or_group([name])
        unsafe = [task.config.task for task in _tasks_of(loaded) if task.config.unsafe_code]
        if unsafe:
            raise InputError(f"--tasks: {unsafe[0]} runs what a model writes without a sandbox: use mbpp or humaneval instead")
        yield HarnessTask(name, loaded, manager, **settings)


def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=None if folder is None else str(folder))


def _tasks_of(loaded: Mapping[Any, Any]) -> Iterator[Any]:
    for value in loaded.values():
        if isinstance(value, Mapping):
            yield from _tasks_of(value)
        elif value is not None:
            yield value


def _main_figure(name: str, results: Mapping[str, Any], samples: Mapping[str, Any]) -> tuple[str, float]:
    """The first figure of the task, or of the group, and its metric's name in the samples."""
    figures = {key: value for key, value in results[name].items() if isinstance(value, int | float) and "_stderr" not in key}
    for key, value in figures.items():
        metric = key.partition(",")[0]
        if any(metric in sample for task in samples.values() for sample in task) and math.isfinite(value):
            return metric, float(value)
    raise InputError(f"--tasks: {name} has no figure of its own: name the tasks in it")


def _samples(samples: Mapping[str, Sequence[Row]], metric: str) -> Iterator[tuple[str, Row]]:
    for task, rows in samples.items():
        for row in rows:
            if isinstance(row.get(metric), int | float):
                yield task, row


def _values(rows: Sequence[Row]) -> np.ndarray:
    """The figures of all questions; the last row is the harness's own."""
    return np.array([row["value"] for row in rows[:-1]], np.float64)


def _is_mean(values_N: np.ndarray, figure: float) -> bool:
    return len(values_N) > 0 and bool(abs(values_N.mean() - figure) < _CLOSE)


def _with_count(values_N: np.ndarray) -> np.ndarray:
    return np.stack([values_N, np.ones_like(values_N)], axis=1)


def _mean(sums: np.ndarray) -> np.ndarray:
    quotient: np.ndarray = sums[..., 0] / sums[..., 1]
    return quotient


@contextmanager
def _explained(task: str, model: str) -> Iterator[None]:
    """While the harness does something: an InputError where it cannot."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of data sets, models and tasks, which have no common one
        text = " ".join(str(error).split())[:200]
        what = f"asked of {model}" if model else "prepared; its data may need a network"
        raise InputError(f"--tasks: {task} could not be {what}: {type(error).__name__}: {text}") from error
