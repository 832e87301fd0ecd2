"""The data of a report, checked: the page shows nothing else, and embeds it as JSON.

Each class reads one kind of file. What a file has beyond the fields is left out, so that a newer file still shows; what is of the
wrong kind is refused, and the page says so. `path` is the file's, below the folder that the report is of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=-1e-6, le=1 + 1e-6)]
Amount = Annotated[float, Field(ge=0)]


class Data(BaseModel):
    """Base: frozen, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


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


class TextRoute(Data):
    """The routing of one text, as in `moerge.inference.result.TextRoute`; mappings are by expert."""

    documents: int
    alpha: Mapping[str, Share]
    first: Mapping[str, Share]
    entropy: float
    accuracy: Share | None
    oracle_accuracy: Share | None = None
    best: Mapping[str, Share] | None = None
    loss: Mapping[str, float] | None = None
    layers: tuple[Mapping[str, Share], ...] | None = None


class Route(File):
    """The result of `moerge route --out`."""

    checkpoint: str
    level: str
    digest: str | None = None
    experts: tuple[str, ...]
    texts: Annotated[Mapping[str, TextRoute], Field(min_length=1)]
    accuracy: Share | None
    oracle_accuracy: Share | None = None
    load: Mapping[str, Share]
    balance: Amount
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _same_experts(self) -> Route:
        known = set(self.experts)
        for name, text in self.texts.items():
            if any(set(shares) != known for shares in (text.alpha, text.first, *(text.layers or ()))):
                raise ValueError(f"text {name!r} has other experts than the rest")
        if not known or set(self.load) != known:
            raise ValueError("the load is not that of the experts")
        return self


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


class Learning(File):
    """The result of `moerge learn`: coefficients by expert, layer and part of a layer, and curves."""

    experts: tuple[str, ...] = ()
    initial: float | None = None
    objective: str = ""
    layers: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    coefficients: Mapping[str, tuple[tuple[float | None, ...], ...]] = {}
    means: Mapping[str, float] = {}
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


class PairRow(Data):
    """Two experts in a region, as in `moerge.comparison.similarity.Pair`. Parts of layers are left out: their files have them."""

    scope: str
    layer: int | None
    role: str
    a: str
    b: str
    parameters: int
    cosine: float | None
    sign_conflict_changed: float | None
    relative_distance: float | None
    parameter_cosine: float | None


class ExpertRow(Data):
    """An expert in a region, as in `moerge.comparison.similarity.Expert`."""

    scope: str
    layer: int | None
    role: str
    expert: str
    parameters: int
    norm: float
    relative_norm: float | None = None
    averaged: float | None = None
    trimmed: Share | None = None
    outvoted: Share | None = None
    survives: Share | None = None


class Verdict(Data):
    """A verdict on a role, and its reason."""

    role: str
    answer: str
    reason: str
    parameters: int
    cosine: float | None
    sign_conflict: float | None
    drift: float | None
    distance: float | None


def _without_parts(value: Any) -> Any:
    return (
        [row for row in value if not (isinstance(row, dict) and row.get("scope") == "part")] if isinstance(value, list) else value
    )


class Comparison(File):
    """The result of `moerge compare --out`. `unheeded` are roles that should stay separate and that the recipe merges."""

    recipe: str
    models: Mapping[str, str]
    experts: tuple[str, ...]
    compared: str
    densities: tuple[float, ...] = ()
    unheeded: tuple[str, ...] = ()
    advice: str
    verdicts: tuple[Verdict, ...]
    pairs: Annotated[tuple[PairRow, ...], BeforeValidator(_without_parts)]
    rows: Annotated[tuple[ExpertRow, ...], BeforeValidator(_without_parts)]
    warnings: tuple[str, ...] = ()


class Score(Data):
    """A figure, as in `moerge.evaluation.result.Score`: `low` and `high` are a 95% interval, over documents."""

    checkpoint: str
    kind: str
    on: str
    metric: str
    value: float
    standard_error: Amount | None
    low: float | None
    high: float | None
    documents: int


class Difference(Score):
    """A checkpoint's figure less that of another, on the same documents."""

    against: str


class Measure(Data):
    """The result of one checkpoint on one benchmark or text, and its time."""

    checkpoint: str
    kind: str
    on: str
    started: str
    seconds: float
    scores: tuple[Score, ...]
    warnings: tuple[str, ...] = ()


class Evaluation(File):
    """The result of `moerge eval --out`. `digests` are those of the checkpoints' tensors, where moerge merged them."""

    checkpoints: Annotated[tuple[str, ...], Field(min_length=1)]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    measures: tuple[Measure, ...]
    differences: tuple[Difference, ...] = ()
    digests: Mapping[str, str | None] = {}

    @property
    def scores(self) -> tuple[Score, ...]:
        """Return the scores of all measures."""
        return tuple(score for measure in self.measures for score in measure.scores)


class DemoModel(Data):
    """A model of the demo, and its perplexities by domain."""

    model: str
    kind: str
    perplexity: Mapping[str, Amount]


class Demo(File):
    """The result of `moerge demo`."""

    seed: int
    models: tuple[DemoModel, ...]
    seconds: Mapping[str, float] = {}


class Collected(Data):
    """Everything that was found in a folder."""

    folder: str
    checkpoints: tuple[Checkpoint, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    routes: tuple[Route, ...] = ()
    learnings: tuple[Learning, ...] = ()
    tunings: tuple[Tuning, ...] = ()
    tuned: tuple[Tuned, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    demos: tuple[Demo, ...] = ()
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
