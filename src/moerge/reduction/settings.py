"""The recipe of a reduction: the mixture, what stays of it, and the text that decides."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, InstanceOf

from moerge.errors import InputError, suggest
from moerge.files import LONGEST_LABEL, as_path
from moerge.methods.average import Linear
from moerge.methods.coefficients import Coefficients
from moerge.methods.method import MergeMethod, merge_method, merge_methods
from moerge.methods.passthrough import Passthrough
from moerge.methods.statistical import StatisticsMethod
from moerge.recipe.document import Document, plain_copy, read_document
from moerge.reduction.groups import CAPACITY
from moerge.reduction.scores import SCORES, Score

Count = Annotated[int, Field(ge=1)]
_KEYS = ("model", "reduce", "calibration")
_OTHER_SCORES = ("mone", "random")
_UNUSABLE = (Passthrough, Coefficients, StatisticsMethod)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Fold(_Strict):
    """A way to fold the experts of a group into the one that stays. A subclass for each.

    `align` puts the neurons of each member in the order of the expert that stays first, by activations and weights.
    """

    kind: ClassVar[str]
    align: bool = False

    @property
    def needs_text(self) -> bool:
        """Return whether it takes text that runs through the mixture once more."""
        return self.align

    @property
    def computed(self) -> bool:
        """Return whether a fitter computes it, and not an operation of the plan."""
        return True


class AverageFold(Fold):
    """The weighted average (HC-SMoE, M-SMoE, REAM)."""

    kind: ClassVar[str] = "average"

    @property
    def computed(self) -> bool:
        """True where neurons are put in order first."""
        return self.align


class SubspaceFold(Fold):
    """The weighted average, projected on the `rank` leading directions of the members' joint output space (Sub-MoE).

    With `whiten` these are the directions of outputs on text.
    """

    kind: ClassVar[str] = "subspace"
    rank: Count
    whiten: bool = False

    @property
    def needs_text(self) -> bool:
        """True where outputs on text count."""
        return self.align or self.whiten


class FittedFold(Fold):
    """The weighted average, with the down projection by least squares on text, shrunk to the average (MergeMoE)."""

    kind: ClassVar[str] = "fitted"
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3

    @property
    def needs_text(self) -> bool:
        """Always."""
        return True


class MethodFold(Fold):
    """A merge method; `base` is the common ancestor that methods on task vectors need: an expert of the mixture, or a model."""

    kind: ClassVar[str] = "method"
    method: InstanceOf[MergeMethod]
    base: str | int | None = None

    @property
    def computed(self) -> bool:
        """Never."""
        return False


FOLDS: dict[str, type[Fold]] = {fold.kind: fold for fold in (AverageFold, SubspaceFold, FittedFold)}


class Reduction(_Strict):
    """The settings of `reduce`.

    `experts` stay in each layer, of which each token goes to `top_k` (as before if not given). `score` says how good an expert
    is: a name in `SCORES`, `mone`, `random`, or powers. `domains: union` keeps the best of each domain's text, `pooled` the best
    of all of it. `protect: super` keeps experts with massive activations. `inverse` keeps the worst, to compare with.

    `merge` is how what goes is folded into what stays, None for not at all; `groups` is what goes where: `ream`, at most
    `capacity` together, `hierarchical` (HC-SMoE) or `kmeans` (Sub-MoE). `router: fit` fits the rows that stay to the old
    router's choice.

    Of each domain at most `texts` documents of at most `tokens` tokens are run. On `similarity_tokens` of them all experts run,
    if groups need that; folds and routers are fitted to as many. `statistics` is the folder of what was gathered, beside the
    result by default. `dtype` is what the mixture is run in: float32 for float16, and else as stored.
    """

    experts: Count
    top_k: Count | None = None
    score: str | Score = "reap"
    domains: Literal["pooled", "union"] = "pooled"
    protect: Literal["super", "none"] = "super"
    inverse: bool = False
    merge: InstanceOf[Fold] | None = None
    groups: Literal["ream", "hierarchical", "kmeans"] = "ream"
    capacity: Annotated[int, Field(ge=2)] = CAPACITY
    router: Literal["slice", "fit"] = "slice"
    texts: Count = 200
    tokens: Annotated[int, Field(ge=2)] = 512
    similarity_tokens: Count = 32768
    statistics: str | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] | None = None

    @property
    def needs_text(self) -> bool:
        """Return whether text runs through the mixture once more after the choice."""
        return self.router == "fit" or (self.merge is not None and self.merge.needs_text)


class ReductionRecipe(_Strict):
    """A recipe. `folder` is what relative paths start from, `written` the document as the user wrote it."""

    model: Annotated[str, Field(min_length=1)]
    reduction: Reduction
    calibration: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$", max_length=LONGEST_LABEL)], Annotated[str, Field(min_length=1)]
    ] = Field(default_factory=dict)
    folder: Path = Path()
    source: str = "recipe"
    written: dict[str, Any] = Field(default_factory=dict)


def load_reduction(recipe: str | Path | Mapping[str, Any] | ReductionRecipe) -> ReductionRecipe:
    """A recipe from a YAML file's path or from the same structure as a dict.

    Raises InputError that names the line and key at fault.
    """
    if isinstance(recipe, ReductionRecipe):
        return recipe
    if isinstance(recipe, Mapping):
        document, folder = Document(plain_copy(recipe)), Path()
    else:
        path = as_path(recipe, "a recipe")
        document, folder = read_document(path, "reduction"), path.parent
    written = deepcopy(document.data)
    unknown = next((str(key) for key in document.data if key not in _KEYS), None)
    if unknown:
        raise document.error((unknown,), f": unknown key of a reduction, {suggest(unknown, _KEYS)}", code="unknown-name")
    section = document.mapping(("reduce",), document.data.get("reduce"))
    section["score"] = _score(document, section.get("score", "reap"))
    section["merge"] = _fold(document, section.get("merge", "none"))
    reduction = document.build(Reduction, section, ("reduce",))
    own = {key: document.data[key] for key in ("model", "calibration") if document.data.get(key) is not None}
    facts = {"folder": folder, "source": document.source, "written": written}
    return document.build(ReductionRecipe, {**own, **facts, "reduction": reduction})


def _score(document: Document, value: Any) -> Any:
    if isinstance(value, dict):
        given = document.mapping(("reduce", "score"), value)
        wrong = next((key for key in given if key not in Score._fields), None)
        if wrong or given.keys() != set(Score._fields) or not _are_powers(given):
            raise document.error(
                ("reduce", "score"), " should be a name, or 'mean: true|false' with the powers 'gate' and 'norm', each 0, 1 or 2"
            )
        return Score(**given)
    known = (*SCORES, *_OTHER_SCORES)
    if value not in known:
        raise document.error(("reduce", "score"), f": unknown score {value!r}, {suggest(str(value), known)}", code="unknown-name")
    return value


def _are_powers(given: Mapping[str, Any]) -> bool:
    return type(given["mean"]) is bool and all(type(given[key]) is int and given[key] in (0, 1, 2) for key in ("gate", "norm"))


def _fold(document: Document, value: Any) -> Fold | None:
    path = ("reduce", "merge")
    given = {"method": value} if isinstance(value, str) else document.mapping(path, value)
    name = str(given.pop("method", "average"))
    if name == "none":
        if given:
            raise document.error(path, f": {next(iter(given))!r} has no effect on 'none': remove it")
        return None
    if name in FOLDS:
        return document.build(FOLDS[name], given, path)
    try:
        kind = merge_method(name)
    except InputError:
        known = ("none", *FOLDS, *merge_methods())
        raise document.error(path, f": unknown way to merge {name!r}, {suggest(name, known)}", code="unknown-name") from None
    if issubclass(kind, _UNUSABLE):
        raise document.error(path, f": {name} cannot fold experts: choose another method, such as 'average'")
    base = given.pop("base", None)
    method = document.build(kind, given, path)
    if method.uses_task_vectors and base is None:
        raise document.error(
            path, f": {name} works on task vectors, so it needs a 'base': the expert, or the model, that the others stem from"
        )
    return MethodFold(method=Linear() if isinstance(method, Linear) else method, base=base)
