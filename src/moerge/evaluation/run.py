"""`moerge eval` as a function: every checkpoint on every benchmark and text, one after another."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.evaluation.any_task import harness_tasks
from moerge.evaluation.benchmarks import MAX_NEW_TOKENS, Benchmark, parse_tasks
from moerge.evaluation.bootstrap import LEVEL, RESAMPLES
from moerge.evaluation.data import load_questions
from moerge.evaluation.identity import identity, routes_sequences, tensors_digest
from moerge.evaluation.measuring import BenchmarkTask, Row, Task, TextTask
from moerge.evaluation.records import Records
from moerge.evaluation.result import Difference, Evaluation, Measure
from moerge.evaluation.store import Store
from moerge.evaluation.texts import check_held_out, read_texts
from moerge.progress import Progress, reporter
from moerge.runtime.loading import Loaded, load

GIVEN = 256
"""Characters at the beginning of each document that are not predicted, if one of the checkpoints routes sequences."""


@dataclass(frozen=True)
class Settings:
    """The settings of an evaluation.

    `others` are further tasks of lm-evaluation-harness by name, `task_folder` has the user's own, and `shots` are their examples,
    None for each task's number. `texts` are locations by domain. `data` is the folder of the benchmarks' files, None for the Hub.
    `limit` is of the questions of each benchmark and the documents of each text. `given` are the characters at the beginning of
    each document that are read but not predicted: None for 256 if one of the checkpoints routes sequences, else 0. `window` is
    how many tokens of a document are read at once: None for 2048, or what the model takes. `seed` is the bootstrap's.
    `chat` asks the six benchmarks' questions in each model's chat template, examples as earlier turns.
    """

    benchmarks: tuple[Benchmark, ...] = ()
    others: tuple[str, ...] = ()
    task_folder: Path | None = None
    shots: int | None = None
    texts: dict[str, str] = field(default_factory=dict)
    data: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = MAX_NEW_TOKENS
    window: int | None = None
    given: int | None = None
    seed: int = 0
    chat: bool = False
    device: str | None = None
    dtype: str | None = None
    allow_code_execution: bool = False
    allow_calibration_text: bool = False
    trust_remote_code: bool = False


def evaluate(
    checkpoints: str | Path | Sequence[str | Path],
    settings: Settings | None = None,
    *,
    tasks: Sequence[str] = (),
    perplexity: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    progress: Progress | bool = False,
    **options: Any,
) -> Evaluation:
    """Measure checkpoints on benchmarks and held-out text, and compare them with the first one.

    Needs torch and transformers, and for benchmarks lm_eval.

    Args:
        checkpoints: A folder or Hub id, or several.
        settings: All settings at once, instead of `tasks`, `perplexity` and `options`.
        tasks: Names of benchmarks, such as "gsm8k", and of other tasks of lm-evaluation-harness.
        perplexity: Files of held-out text by domain.
        out: A folder for results, which are complete after every measure.
        resume: Continue an interrupted run in `out`.
        progress: A `Progress`, or True for a display on standard error.
        **options: Further fields of `Settings`, such as limit=100.

    Returns:
        Scores with their errors, and paired differences from the first checkpoint.

    Raises:
        InputError: Data are missing, a checkpoint does not load or was calibrated on the text, or a benchmark would run code
            without leave to.
        MachineError: The disk is full.
    """
    if settings is None:
        benchmarks, others = parse_tasks(",".join(tasks)) if tasks else ((), ())
        settings = Settings(benchmarks, others, texts=dict(perplexity or {}), **options)
    names = [str(checkpoint) for checkpoint in ([checkpoints] if isinstance(checkpoints, str | Path) else checkpoints)]
    out = Path(out) if out is not None else None
    _check(names, settings)
    store = Store(out, resume=resume)
    routed = [routes_sequences(name) for name in names]  # of all, so that a wrong path shows at once
    if any(routed) and settings.given is None:
        settings = replace(settings, given=GIVEN)
    if any(routed) and settings.texts and not settings.given:
        raise InputError(
            f"--given 0: {names[routed.index(True)]} routes by the beginning of a document: give it some characters that are "
            "not predicted"
        )
    with reporter(progress) as report:
        run = _Run(store, settings, _tasks(settings), report)
        warnings = run.held_out(names)
        found: list[_Done] = []
        for name in names:
            for measure, rows in run.checkpoint(name, warnings[name]):
                found.append((measure, rows))
                store.write(run.evaluation(names, found))
    return run.evaluation(names, found)


def _check(names: Sequence[str], settings: Settings) -> None:
    if not names:
        raise InputError("name a checkpoint to evaluate")
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"the checkpoint {name} is there twice: name each one once")
    if not settings.benchmarks and not settings.others and not settings.texts:
        raise InputError("nothing to measure: name benchmarks with --tasks, or text with --perplexity DOMAIN=FILE")
    if settings.chat and settings.others:
        raise InputError(f"--tasks {settings.others[0]}: --chat asks moerge's own benchmarks alone: leave it out")
    if settings.chat and not settings.benchmarks:
        raise InputError("--chat is about benchmarks: name some with --tasks; --perplexity writes conversations so by itself")
    if settings.chat and (going_on := [one.name for one in settings.benchmarks if one.continues]):
        raise InputError(f"--tasks {going_on[0]}: it lets a model continue a program, which is no question to ask with --chat")
    code = [benchmark.name for benchmark in settings.benchmarks if benchmark.runs_code]
    if code and not settings.allow_code_execution:
        raise InputError(
            f"--tasks {','.join(code)}: programs that the model writes are run to judge them: allow that with "
            "--allow-code-execution, best in a container"
        )


def _tasks(settings: Settings) -> tuple[Task, ...]:
    """Everything to measure, read before a model is loaded."""
    if settings.benchmarks:
        from moerge.evaluation.harness import require_harness

        require_harness()
    asked = (load_questions(benchmark, settings.data) for benchmark in settings.benchmarks)
    size, seed, given = settings.batch_size, settings.seed, settings.given or 0
    texts = read_texts(settings.texts, limit=settings.limit, given=given)
    return (
        *(BenchmarkTask(questions, settings.limit, settings.max_new_tokens, size, seed, settings.chat) for questions in asked),
        *harness_tasks(
            settings.others, settings.task_folder, limit=settings.limit, shots=settings.shots, batch_size=size, seed=seed
        ),
        *(TextTask(text, settings.window, given, size, seed) for text in texts),
    )


_Done = tuple[Measure, Sequence[Row]]


@dataclass(frozen=True)
class _Run:
    store: Store
    settings: Settings
    tasks: Sequence[Task]
    progress: Progress

    def held_out(self, names: Sequence[str]) -> dict[str, Mapping[str, tuple[str, ...]]]:
        """Warnings by checkpoint and domain about text that is not held out."""
        texts = [task.text for task in self.tasks if isinstance(task, TextTask)]
        allow = self.settings.allow_calibration_text
        return {name: check_held_out(name, texts, allow=allow) for name in names}

    def checkpoint(self, name: str, warnings: Mapping[str, tuple[str, ...]]) -> Iterator[_Done]:
        """Each measure of one checkpoint, which is loaded if one of them is not there yet."""
        which, loaded = identity(name), None
        for task in self.tasks:
            fingerprint = Records.key(which, task.kind, task.name, _without_places(task), self.settings.dtype, _version("moerge"))
            earlier = self.store.earlier(fingerprint)
            if earlier is not None:
                yield earlier[0].model_copy(update={"checkpoint": name}), earlier[1]
                continue
            loaded = loaded or self._load(name)
            yield self._measure(loaded, task, fingerprint, warnings.get(task.name, ()) if task.kind == "text" else ())

    def _load(self, name: str) -> Loaded:
        settings = self.settings
        return load(name, trust_remote_code=settings.trust_remote_code, dtype=settings.dtype, device=settings.device)

    def _measure(self, loaded: Loaded, task: Task, fingerprint: str, warnings: tuple[str, ...]) -> _Done:
        name, started, begun = loaded.name, datetime.now(UTC), time.perf_counter()
        records = self.store.records(name, task.kind, task.name, fingerprint)
        advance = self.progress.phase(f"{Path(name).name}, {task.name}", task.documents, "texts")
        rows, remarks = task.measure(loaded, records, advance)
        self.progress.finish()
        measure = Measure(
            checkpoint=name,
            kind=task.kind,
            on=task.name,
            fingerprint=fingerprint,
            started=started.isoformat(timespec="seconds"),
            seconds=round(time.perf_counter() - begun, 3),
            scores=task.scores(name, rows),
            documents_file=self.store.write_documents(name, task.kind, task.name, rows),
            warnings=(*warnings, *remarks),
        )
        return measure, rows

    def evaluation(self, names: Sequence[str], found: Sequence[_Done]) -> Evaluation:
        """Return the evaluation so far."""
        return Evaluation(
            checkpoints=tuple(names),
            measures=tuple(measure for measure, _ in found),
            differences=tuple(self._differences(names[0], found)),
            settings=self._as_json(),
            versions=_versions(),
            digests={name: tensors_digest(name) for name in names},
        )

    def _differences(self, first: str, found: Sequence[_Done]) -> Iterator[Difference]:
        tasks = {(task.kind, task.name): task for task in self.tasks}
        firsts = {(measure.kind, measure.on): rows for measure, rows in found if measure.checkpoint == first}
        for measure, rows in found:
            key = (measure.kind, measure.on)
            if measure.checkpoint != first and key in firsts:
                yield tasks[key].difference(measure.checkpoint, rows, first, firsts[key])

    def _as_json(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "benchmarks": {task.name: task.settings() for task in self.tasks if task.kind == "benchmark"},
            "texts": {task.name: task.settings() for task in self.tasks if task.kind == "text"},
            "limit": settings.limit,
            "batch_size": settings.batch_size,
            "dtype": settings.dtype,
            "device": settings.device,
            "bootstrap": {"resamples": RESAMPLES, "seed": settings.seed, "interval": LEVEL},
        }


def _without_places(task: Task) -> dict[str, Any]:
    """Moving data changes no figure."""
    return {key: value for key, value in task.settings().items() if key not in ("source", "location")}


def _versions() -> dict[str, str]:
    packages = ("moerge", "torch", "transformers", "tokenizers", "lm_eval", "datasets")
    found = {package: _version(package) for package in packages}
    return {"python": platform.python_version(), **{package: number for package, number in found.items() if number}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
