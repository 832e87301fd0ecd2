"""The data of a report, checked: the page shows nothing else, and embeds it as JSON.

What a file has beyond the fields is left out, so that a newer file still shows; what is of the wrong kind is refused, and the
page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, field_serializer

from moerge.comparison.result import Comparison
from moerge.comparison.similarity import Expert, Pair
from moerge.demonstration.result import DemoResult
from moerge.evaluation.result import Evaluation
from moerge.inference.result import Routes
from moerge.learning.coefficient_figure import CoefficientTable
from moerge.results import Data


class File(Data):
    """A file that was read, and when it was last written, in UTC."""

    path: str
    written: str

    @property
    def folder(self) -> str:
        """The file's folder below the report's, "." for that itself."""
        return self.path.rpartition("/")[0] or "."


def _length(value: Any) -> Any:
    return len(value) if isinstance(value, list) else value


class Input(Data):
    """A model that went into a merge."""

    location: str
    revision: str | None = None
    tensors_read: int
    digest: str


class CalibrationText(Data):
    """Text that something was fitted to; of its documents only the number is kept."""

    location: str
    digest: str
    documents: Annotated[int, BeforeValidator(_length)]


class Operation(Data):
    """Tensors that came about alike."""

    action: str
    hyperparameters: str
    tensors: int
    bytes: int


class Role(Data):
    """Tensors of one role."""

    role: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int


class Checkpoint(File):
    """A merged checkpoint: its manifest, and what its headers say. `operations` are None in manifests of older versions.

    `digest` is that of all tensors, by which results are known to be of this checkpoint.
    """

    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    models: Mapping[str, Input]
    experts: tuple[str, ...]
    operations: tuple[Operation, ...] | None = None
    calibration: Mapping[str, CalibrationText] = {}
    tuning: Mapping[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    model_type: str
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    layers: int | None
    hidden_size: int | None
    roles: tuple[Role, ...]
    routing: Mapping[str, Any] | None = None
    digest: str = ""


class RouteFile(Routes, File):
    """The result of `moerge route --out`."""


class Update(Data):
    """A row of a learning curve."""

    update: int
    train: float | None = None
    heldout: float | None = None


class Stage(Data):
    """One run of learning: its curve, and which update was kept."""

    best_update: int | None = None
    stopped_early: bool = False
    updates: tuple[Update, ...]


class Learning(CoefficientTable, File):
    """The result of `moerge learn`: coefficients by expert, layer and part of a layer, and curves."""

    objective: str = ""
    stages: tuple[Stage, ...] = ()


class Tuning(File):
    """Training metrics: numbers by step, and the load of each expert, the mean over layers. Of long runs not every step."""

    steps: int
    every: int = 1
    points: Mapping[str, tuple[tuple[float, float], ...]]
    load: tuple[tuple[float, tuple[float, ...]], ...] = ()


class Tuned(File):
    """The facts of a `moerge tune` run: its settings, models, and the time it took."""

    versions: Mapping[str, str]
    settings: Mapping[str, Any]
    models: Mapping[str, Any] = {}
    seconds: float | None = None


class ComparisonFile(Comparison, File):
    """The result of `moerge compare --out`. The page's JSON leaves out parts of layers: their files have them."""

    @field_serializer("pairs", "rows")
    def _without_parts(self, rows: Sequence[Pair | Expert]) -> list[dict[str, Any]]:
        return [row.model_dump(mode="json") for row in rows if row.scope != "part"]


class EvaluationFile(Evaluation, File):
    """The result of `moerge eval --out`."""


class DemoFile(DemoResult, File):
    """The result of `moerge demo`."""


class Collected(Data):
    """Everything that was found in a folder."""

    folder: str
    checkpoints: tuple[Checkpoint, ...] = ()
    comparisons: tuple[ComparisonFile, ...] = ()
    routes: tuple[RouteFile, ...] = ()
    learnings: tuple[Learning, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    tuned: tuple[Tuned, ...] = ()
    evaluations: tuple[EvaluationFile, ...] = ()
    demos: tuple[DemoFile, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def files(self) -> Sequence[tuple[str, File]]:
        """All files that were used, and the command that writes each."""
        kinds: list[tuple[str, Sequence[File]]] = [
            ("moerge merge", self.checkpoints),
            ("moerge compare", self.comparisons),
            ("moerge route", self.routes),
            ("moerge learn", self.learnings),
            ("moerge tune", (*self.tunings, *self.tuned)),
            ("moerge eval", self.evaluations),
            ("moerge demo", self.demos),
        ]
        return [(command, file) for command, files in kinds for file in files]
