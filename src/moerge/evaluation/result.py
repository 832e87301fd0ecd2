"""Results of an evaluation, as results.json holds them, and as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, computed_field

from moerge.results import Amount, Data, Result

Kind = Literal["benchmark", "text"]


class Score(Data):
    """One figure of one checkpoint, over so many documents (a benchmark's questions, a text's documents).

    Errors are None for a single document. `exact_match` and `pass@1` are shares, `perplexity` is exp of nats per token,
    `bits_per_byte` and `nats_per_byte` are what they say. `low` and `high` are a 95% interval.
    """

    checkpoint: str
    kind: Kind
    on: str
    metric: str
    value: float
    standard_error: Amount | None
    low: float | None
    high: float | None
    documents: int


class Difference(Score):
    """A checkpoint's figure less that of the checkpoint `against`, on the same documents."""

    against: str


class Measure(Data):
    """All that came out of one checkpoint on one benchmark or text. `fingerprint` is of everything that it depends on."""

    checkpoint: str
    kind: Kind
    on: str
    fingerprint: str = ""
    started: str
    seconds: float
    scores: tuple[Score, ...]
    documents_file: str | None = None
    warnings: tuple[str, ...] = ()


class Evaluation(Result):
    """Scores of checkpoints, and differences from the first of them. `digests` are of the tensors, None where moerge did not
    merge them."""

    format: int = 1
    checkpoints: Annotated[tuple[str, ...], Field(min_length=1)]
    digests: Mapping[str, str | None] = {}
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    measures: tuple[Measure, ...]
    differences: tuple[Difference, ...] = ()

    @computed_field  # type: ignore[prop-decorator]
    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of all measures."""
        return tuple(warning for measure in self.measures for warning in measure.warnings)

    @property
    def scores(self) -> tuple[Score, ...]:
        """Return the scores of all measures."""
        return tuple(score for measure in self.measures for score in measure.scores)


def to_csv(rows: Sequence[Score], kind: type[Score]) -> str:
    """A line for each row, with every field."""
    out = io.StringIO()
    table = csv.DictWriter(out, list(kind.model_fields), lineterminator="\n")
    table.writeheader()
    table.writerows(dict(row) for row in rows)
    return out.getvalue()
