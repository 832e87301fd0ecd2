"""Results of an evaluation, as JSON and as tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from moerge.formatting import Displayed

Kind = Literal["benchmark", "text"]


@dataclass(frozen=True)
class Score:
    """One figure of one checkpoint, over so many documents (a benchmark's questions, a text's documents).

    Errors are None for a single document. `exact_match` and `pass@1` are shares, `perplexity` is exp of nats per token,
    `bits_per_byte` and `nats_per_byte` are what they say. `low` and `high` are a 95% interval.
    """

    checkpoint: str
    kind: Kind
    on: str
    metric: str
    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    documents: int


@dataclass(frozen=True)
class Difference(Score):
    """A checkpoint's figure less that of the checkpoint `against`, on the same documents."""

    against: str


@dataclass(frozen=True)
class Measure:
    """All that came out of one checkpoint on one benchmark or text. `fingerprint` is of everything that it depends on."""

    checkpoint: str
    kind: Kind
    on: str
    fingerprint: str
    started: str
    seconds: float
    scores: tuple[Score, ...]
    documents_file: str | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Measure:
        """Read what `asdict` wrote; KeyError or TypeError if it is something else."""
        scores = tuple(Score(**score) for score in value["scores"])
        return cls(**{**value, "scores": scores, "warnings": tuple(value["warnings"])})


@dataclass(frozen=True, repr=False)
class Evaluation(Displayed):
    """Scores of checkpoints, and differences from the first of them. `digests` are of the tensors, None where moerge did not
    merge them."""

    checkpoints: tuple[str, ...]
    measures: tuple[Measure, ...]
    differences: tuple[Difference, ...]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    digests: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def scores(self) -> tuple[Score, ...]:
        """Return the scores of all measures."""
        return tuple(score for measure in self.measures for score in measure.scores)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings of all measures."""
        return tuple(warning for measure in self.measures for warning in measure.warnings)

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json` and results.json."""
        return {
            "format": 1,
            "checkpoints": list(self.checkpoints),
            "digests": dict(self.digests),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "measures": [asdict(measure) for measure in self.measures],
            "differences": [asdict(difference) for difference in self.differences],
            "warnings": list(self.warnings),
        }


def to_csv(rows: Sequence[Score], kind: type[Score]) -> str:
    """A line for each row, with every field."""
    out = io.StringIO()
    names = [each.name for each in fields(kind)]
    table = csv.writer(out, lineterminator="\n")
    table.writerow(names)
    for row in rows:
        table.writerow(["" if getattr(row, name) is None else getattr(row, name) for name in names])
    return out.getvalue()
