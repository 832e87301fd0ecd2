"""SEARCH.yaml: which parameters of a recipe are searched, and what is good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from moerge.errors import suggest
from moerge.files import as_path
from moerge.recipe.document import Document, plain_copy, read_document

Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Texts = dict[str, str]
METRICS = ("bits_per_byte", "kl", "bytes")
WEIGHTS = "weights"
"""The key of a search that is no path into the recipe: smooth weights of experts."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Range(_Strict):
    """Numbers from a least to a greatest: whole ones if both are, even in their logarithm with `log`, `step` apart."""

    range: tuple[Number, Number] = Field(strict=False)
    log: bool = False
    step: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Range:
        least, greatest = self.range
        if least >= greatest:
            raise ValueError(f"the range is empty: {least:g} is not less than {greatest:g}")
        if self.log and (least <= 0 or self.step):
            raise ValueError("a range with 'log' begins above 0 and has no 'step'")
        return self


class Choice(_Strict):
    """One of several values."""

    choice: tuple[Any, ...] = Field(strict=False, min_length=1)


class SmoothWeights(_Strict):
    """Weights of the experts that change smoothly with depth: values at `points` layers, straight lines between them.

    `by` says what has weights of its own: each expert, and each role where "role" is named. With one point a weight is the same
    in all layers.
    """

    by: tuple[Literal["expert", "role"], ...] = Field(default=("expert",), strict=False, min_length=1)
    roles: tuple[str, ...] = Field(default=("attention", "ffn"), strict=False, min_length=1)
    points: Count = 1
    range: tuple[Number, Number] = Field(default=(0.0, 2.0), strict=False)

    @model_validator(mode="after")
    def _check(self) -> SmoothWeights:
        if self.range[0] >= self.range[1]:
            raise ValueError(f"the range is empty: {self.range[0]:g} is not less than {self.range[1]:g}")
        return self


def _metric(value: Any) -> Any:
    """`bytes` stands for `{bytes: true}`."""
    return {value: True} if isinstance(value, str) else value


class _Objective(_Strict):
    """One figure that is minimised: exactly one of the metrics, and how its domains become one number."""

    bits_per_byte: Texts | Literal[True] | None = None
    kl: Texts | Literal[True] | None = None
    bytes: Literal[True] | None = None
    over: Literal["mean", "worst"] | dict[str, Positive] = "mean"

    @property
    def metric(self) -> str:
        """The name of its metric."""
        return next(name for name in METRICS if getattr(self, name) is not None)

    @property
    def texts(self) -> Texts | None:
        """Its texts by domain, None where they are those of the whole search."""
        value = getattr(self, self.metric)
        return value if isinstance(value, dict) else None

    @model_validator(mode="after")
    def _check(self) -> _Objective:
        if sum(getattr(self, name) is not None for name in METRICS) != 1:
            raise ValueError(f"an objective has one of {', '.join(METRICS)}")
        return self


Objective: TypeAlias = Annotated[_Objective, BeforeValidator(_metric)]


def _listed(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


class Search(_Strict):
    """The settings of a search.

    `texts` are files by domain for objectives that name none; `heldout` are files by domain for the honest figure, or the share
    of each text that is kept for it. `documents` is how many documents of a text are used for searching at most. `given` are
    characters at the beginning of each document that are read but not predicted, as sequence-routed models need them.
    """

    recipe: Any
    search: dict[str, Any] = Field(min_length=1)
    objective: Annotated[tuple[Objective, ...], BeforeValidator(_listed)] = Field(strict=False, min_length=1)
    texts: Texts = Field(default_factory=dict)
    heldout: Texts | Annotated[float, Field(gt=0, lt=1)] = 0.5
    documents: Count = 64
    window: Count | None = None
    given: Annotated[int, Field(ge=0)] | None = None
    trials: Count = 20
    hours: Positive | None = None
    sampler: Literal["auto", "tpe", "cmaes", "nsga2", "random"] = "auto"
    prune: bool = True
    storage: str | None = None
    study: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


@dataclass(frozen=True)
class SearchFile:
    """Settings and where they stand."""

    settings: Search
    document: Document
    folder: Path

    def place(self, location: str) -> str:
        """A path in the file as one from the working directory."""
        return str(self.folder / Path(location).expanduser())


Kind = Range | Choice | SmoothWeights


def load_search(search: str | Path | Mapping[str, Any], **changes: Any) -> SearchFile:
    """Read SEARCH.yaml, or the same structure as a dict; `changes` replace keys where they are not None.

    Raises InputError that names the line and key at fault.
    """
    if isinstance(search, Mapping):
        document, folder = Document(plain_copy(search, "search"), "search"), Path()
    else:
        path = as_path(search, "a search file")
        document, folder = read_document(path, "search file"), path.parent
    data = {**document.data, **{key: value for key, value in changes.items() if value is not None}}
    for key in data:
        if key not in Search.model_fields:
            raise document.error((str(key),), f": unknown key, {suggest(str(key), Search.model_fields)}", code="unknown-name")
    settings = document.build(Search, data)
    file = SearchFile(settings, document, folder)
    _check(file)
    return file


def parameters(file: SearchFile) -> dict[str, Kind]:
    """Values that each key of `search` may take. Raises InputError that names the key at fault."""
    return {key: _kind(file.document, key, value) for key, value in file.settings.search.items()}


def _kind(document: Document, key: str, value: Any) -> Kind:
    path = ("search", key)
    section = document.mapping(path, value)
    if key == WEIGHTS:
        return document.build(SmoothWeights, section, path)
    if ("range" in section) == ("choice" in section):
        raise document.error(path, " should be {range: [least, greatest]} or {choice: [one, another]}")
    return document.build(Range, section, path) if "range" in section else document.build(Choice, section, path)


def _check(file: SearchFile) -> None:
    settings, error = file.settings, file.document.error
    parameters(file)
    for index, objective in enumerate(settings.objective):
        texts = objective.texts if objective.texts is not None else settings.texts
        if objective.metric != "bytes" and not texts:
            raise error(("objective",), f": {objective.metric} needs texts, such as {{{objective.metric}: {{math: math.jsonl}}}}")
        missing = sorted(set(objective.over) ^ set(texts)) if isinstance(objective.over, dict) else []
        if missing:
            raise error(("objective", index, "over"), f": {missing[0]!r} has no weight or no text: name the same domains in both")
    if isinstance(settings.heldout, dict):
        searched = {name for objective in settings.objective for name in (objective.texts or settings.texts)}
        unknown = sorted(set(settings.heldout) - searched)
        if unknown:
            raise error(("heldout", unknown[0]), f": no objective has a text {unknown[0]!r}: {suggest(unknown[0], searched)}")
    if len(settings.objective) > 1 and settings.sampler == "cmaes":
        raise error(("sampler",), ": CMA-ES has one objective: choose nsga2 or tpe")
    if len(settings.objective) == 1 and settings.sampler == "nsga2":
        raise error(("sampler",), ": NSGA-II is for several objectives: choose tpe")
