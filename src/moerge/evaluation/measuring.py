"""Tasks: a benchmark or a held-out text. Each gives a row per document, from which its figures follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from moerge.errors import InputError
from moerge.evaluation.bootstrap import Array, Estimate, accuracy, bootstrap
from moerge.evaluation.data import Questions
from moerge.evaluation.likelihood import document_losses
from moerge.evaluation.records import Records
from moerge.evaluation.result import Difference, Kind, Score
from moerge.evaluation.texts import HeldOut
from moerge.runtime.loading import Loaded, context_length
from moerge.texts import has_template, text_of

Row = Mapping[str, Any]
Advance = Callable[[int], None]
WINDOW = 2048
_UNKNOWN_CONTEXT = 2048
"""What a model is taken to read at once whose configuration does not say."""


class Task(Protocol):
    """One benchmark or text."""

    kind: ClassVar[Kind]

    @property
    def name(self) -> str:
        """The benchmark's name, or the text's domain."""

    @property
    def documents(self) -> int:
        """Return how many documents there are to do."""

    def settings(self) -> dict[str, Any]:
        """Everything that its rows depend on besides the checkpoint."""

    def measure(self, loaded: Loaded, records: Records, advance: Advance) -> tuple[list[Row], tuple[str, ...]]:
        """A row for each document, and warnings."""

    def scores(self, checkpoint: str, rows: Sequence[Row]) -> tuple[Score, ...]:
        """Figures with their errors."""

    def difference(self, checkpoint: str, rows: Sequence[Row], against: str, others: Sequence[Row]) -> Difference:
        """Return the first checkpoint's figure less the second's, document by document."""


@dataclass(frozen=True)
class BenchmarkTask:
    """A benchmark's questions. `batch_size` prompts are continued at a time."""

    kind: ClassVar[Kind] = "benchmark"
    questions: Questions
    limit: int | None
    max_new_tokens: int
    batch_size: int
    seed: int
    chat: bool = False

    @property
    def name(self) -> str:
        """The benchmark's."""
        return self.questions.benchmark.name

    @property
    def documents(self) -> int:
        """Return how many questions are asked."""
        return min(len(self.questions.rows), self.limit or len(self.questions.rows))

    def settings(self) -> dict[str, Any]:
        """Prompt, examples, and which questions."""
        from moerge.evaluation.harness import prompt_settings

        benchmark = self.questions.benchmark
        return {
            "title": benchmark.title,
            "metric": benchmark.metric,
            "harness_task": benchmark.task,
            **prompt_settings(benchmark, self.max_new_tokens),
            "source": self.questions.source,
            "digest": self.questions.digest,
            "questions": self.documents,
            **({"chat": True} if self.chat else {}),
        }

    def measure(self, loaded: Loaded, records: Records, advance: Advance) -> tuple[list[Row], tuple[str, ...]]:
        """Ask the model, and judge its answers."""
        from moerge.evaluation.generating import GreedyModel
        from moerge.evaluation.harness import run_task

        context = context_length(loaded) or _UNKNOWN_CONTEXT
        if self.chat and not has_template(loaded.tokenizer):
            raise InputError(f"{loaded.name} has no chat template, so it is no chat model: leave out --chat")
        options: dict[str, Any] = {"batch_size": self.batch_size, "chat": self.chat}
        model = GreedyModel(loaded, records, context=context, advance=advance, **options)
        samples = run_task(model, self.questions, max_new_tokens=self.max_new_tokens, limit=self.limit, chat=self.chat)
        rows: list[Row] = [
            {
                "document": sample.number,
                "correct": sample.verdict.correct,
                "answer": sample.verdict.answer,
                "reason": sample.verdict.reason,
                "response": sample.response,
            }
            for sample in samples
        ]
        cut = f"{self.name}: {model.truncated} of {len(rows)} prompts did not fit into the {context} tokens of {loaded.name} and "
        return rows, (cut + "lost their beginning, so the figures are too low",) if model.truncated else ()

    def scores(self, checkpoint: str, rows: Sequence[Row]) -> tuple[Score, ...]:
        """The share of right answers."""
        return (_score(checkpoint, self, accuracy([bool(row["correct"]) for row in rows]), self._metric, len(rows)),)

    def difference(self, checkpoint: str, rows: Sequence[Row], against: str, others: Sequence[Row]) -> Difference:
        """Return the difference of the shares of right answers."""
        values_N1 = np.array([[float(a["correct"]) - float(b["correct"])] for a, b in zip(rows, others, strict=True)])
        found = bootstrap(lambda sums: sums[..., 0] / len(rows), values_N1, seed=self.seed)
        return _difference(_score(checkpoint, self, found, self._metric, len(rows)), against)

    @property
    def _metric(self) -> str:
        return self.questions.benchmark.metric


@dataclass(frozen=True)
class TextTask:
    """A domain's held-out documents, read in windows of at most `window` tokens."""

    kind: ClassVar[Kind] = "text"
    text: HeldOut
    window: int | None
    given: int
    batch_size: int
    seed: int

    @property
    def name(self) -> str:
        """The domain."""
        return self.text.domain

    @property
    def documents(self) -> int:
        """Return how many there are."""
        return len(self.text.documents)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the documents and of reading them."""
        return {
            "location": self.text.location,
            "digest": self.text.digest,
            "documents": self.documents,
            "left_out_as_too_short": self.text.short,
            "window": self.window,
            "given_characters": self.given,
        }

    def measure(self, loaded: Loaded, records: Records, advance: Advance) -> tuple[list[Row], tuple[str, ...]]:
        """Nats, tokens and bytes of each document."""
        context = context_length(loaded)
        window = self.window or min(WINDOW, context or WINDOW)
        if context is not None and window > context:
            raise InputError(f"{loaded.name} reads {context} tokens at once: choose a --window of at most so many")
        documents, rows = self.text.documents, list[Row]()
        size = 4 * self.batch_size  # windows of like length run together; a killed run loses no more than this
        for start in range(0, len(documents), size):
            part = documents[start : start + size]
            keys = [Records.key(start + index, text_of(document)) for index, document in enumerate(part)]
            if not all(key in records for key in keys):
                losses = document_losses(loaded, part, window=window, given=self.given, batch_size=self.batch_size)
                records.add({key: vars(loss) for key, loss in zip(keys, losses, strict=True)})
            rows += [{"document": start + index, **records[key]} for index, key in enumerate(keys)]
            advance(len(part))
        empty = next((row["document"] for row in rows if not row["tokens"]), None)
        if empty is not None:
            raise InputError(
                f"{loaded.name} has no token to predict in document {empty + 1} of {self.text.location}: leave it out"
            )
        if not all(math.isfinite(row["nats"]) for row in rows):
            raise InputError(f"{loaded.name} does not give finite numbers on {self.name}: try another --dtype")
        if not self.text.short:
            return rows, ()
        left_out = f"{self.text.short} of {self.text.short + len(documents)} documents of {self.text.location}"
        return rows, (f"{self.name}: {left_out} end within the {self.given} characters that are given and were left out",)

    def scores(self, checkpoint: str, rows: Sequence[Row]) -> tuple[Score, ...]:
        """Perplexity and bits per byte."""
        values_N3 = _columns(rows)
        perplexity = bootstrap(lambda sums: np.exp(sums[..., 0] / sums[..., 1]), values_N3, seed=self.seed)
        bits = bootstrap(lambda sums: sums[..., 0] / sums[..., 2] / math.log(2), values_N3, seed=self.seed)
        return tuple(
            _score(checkpoint, self, found, metric, len(rows))
            for metric, found in (("perplexity", perplexity), ("bits_per_byte", bits))
        )

    def difference(self, checkpoint: str, rows: Sequence[Row], against: str, others: Sequence[Row]) -> Difference:
        """Return the difference of nats per byte."""
        values_N6 = np.hstack([_columns(rows), _columns(others)])
        found = bootstrap(lambda sums: sums[..., 0] / sums[..., 2] - sums[..., 3] / sums[..., 5], values_N6, seed=self.seed)
        return _difference(_score(checkpoint, self, found, "nats_per_byte", len(rows)), against)


def _columns(rows: Sequence[Row]) -> Array:
    return np.array([[float(row[key]) for key in ("nats", "tokens", "bytes")] for row in rows])


def _score(checkpoint: str, task: Task, found: Estimate, metric: str, documents: int) -> Score:
    figures = dataclasses.asdict(found)
    if not all(math.isfinite(figure) for figure in figures.values() if figure is not None):
        raise InputError(f"{checkpoint} on {task.name}: {metric} is infinite: this is no model of such text")
    return Score(checkpoint=checkpoint, kind=task.kind, on=task.name, metric=metric, documents=documents, **figures)


def _difference(score: Score, against: str) -> Difference:
    return Difference(**dict(score), against=against)
