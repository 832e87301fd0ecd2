"""The recipe as an object. Every field is what the user wrote or its documented default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, InstanceOf

from moerge.files import LONGEST_LABEL
from moerge.methods.method import Finite, MergeMethod
from moerge.recipe.learning import Learning
from moerge.recipe.rules import MethodChoice, MethodRule, PatternRule
from moerge.recipe.tokens import TokenRow
from moerge.routers.base import Router
from moerge.routers.sequence import FORMAT
from moerge.texts import TextRequest

UNION = "union"
"""The value of `tokenizer` that asks for the tokens of all models."""

DROP = "drop"
"""The value in `parts` that leaves a part out."""

Float = Literal["float32", "float16", "bfloat16"]
"""Element types that a recipe may ask for."""
FLOAT8 = "float8"
"""Instead of one of them: matrices of layers in FP8 with scales for blocks, computed and otherwise stored as bfloat16."""

HETEROGENEOUS_KEYS = ("projectors", "embedding", "route_on", "prefix_tokens")
"""Keys of `moe` that are for experts that stay whole models."""


def _text_of_number(value: Any) -> Any:
    return str(value) if type(value) is int else value


Layers = Annotated[str, BeforeValidator(_text_of_number), Field(pattern=r"^\d+(-\d*)?(,\d+(-\d*)?)*$")]
"""Layers by number, from 0: `8-`, `0-3`, `2,5,7-9`."""


def layers_in(layers: str, count: int) -> list[bool]:
    """Return for each of `count` layers if `layers` name it. ValueError if they name one that is not there."""
    chosen = [False] * count
    for span in layers.split(","):
        first, dash, last = span.partition("-")
        start, stop = int(first), int(last) if last else count - 1 if dash else int(first)
        if not start <= stop < count:
            raise ValueError(f"{span!r} is no span of the {count} layers, which are counted from 0")
        chosen[start : stop + 1] = [True] * (stop + 1 - start)
    return chosen


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Expert(_Strict):
    """A fine-tuned model: a folder or Hub id, perhaps with an adapter on it, and its weight in methods that weigh.

    `packing` is the order of ranks and experts in an adapter's B that holds all experts of a layer, where its file does not say.
    """

    model: str = Field(min_length=1)
    adapter: str | None = Field(default=None, min_length=1)
    packing: Literal["interleaved", "blocks"] | None = None
    weight: Finite = 1.0


def _expert(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


def routes_sequences(moe_format: Any, level: Any) -> bool:
    """Return whether a model in our own format routes sequences, which it does unless its recipe says tokens."""
    return bool(moe_format == FORMAT and level != "token")


class MoE(_Strict):
    """A MoE instead of a dense model: token-routed (MergeME, section 3.1.1; BTX) or sequence-routed (section 3.1.3).

    `include_base` makes the base expert 0, as in the paper; by default wherever there is a base. `mix`, `adapters`, and
    roles other than ffn in `separate`, are for sequence-routed models. `adapters: keep` leaves experts that are LoRA adapters
    adapters, on one copy of the base (Self-MoE).

    `level: token` routes tokens in our own format too, for families without a native one.

    Token-routed models may have a `shared` expert, by its model's name, that every token goes through and that makes up
    `shared_weight` of a layer's output (a base that is shared is no routed expert by default); and experts in some `layers` only
    (`8-`, `0-3,6`).

    `projectors`, `embedding`, `route_on` and `prefix_tokens` are for experts that stay whole models, whatever their architecture
    (section 3.2); naming one of them makes them stay whole even if they are alike.
    """

    separate: tuple[Literal["ffn", "attention", "norm", "embedding", "head"], ...] = Field(default=("ffn",), min_length=1)
    mix: Literal["layer", "output", "logits"] = "layer"
    adapters: Literal["merge", "keep"] = "merge"
    include_base: bool | None = Field(default=None, strict=True)
    top_k: int = Field(default=2, ge=1, strict=True)
    router: InstanceOf[Router]
    format: str = "auto"
    level: Literal["token", "sequence"] | None = None
    shared: str | None = Field(default=None, min_length=1)
    shared_weight: float = Field(default=0.5, gt=0, lt=1, strict=True)
    layers: Layers | None = None
    projectors: Literal["fitted", "random"] = "fitted"
    embedding: Literal["shared", "separate"] = "shared"
    route_on: Literal["prefix", "sequence"] = "prefix"
    prefix_tokens: int = Field(default=64, ge=1, strict=True)

    @property
    def by_sequence(self) -> bool:
        """Return whether whole sequences are routed instead of tokens."""
        return routes_sequences(self.format, self.level)

    @property
    def asks_for_heterogeneous(self) -> bool:
        """Return whether something is said that only makes sense if experts stay whole models."""
        return any(key in self.model_fields_set for key in HETEROGENEOUS_KEYS)


class Override(_Strict):
    """Another method for the tensors that `match`: a role (`attention`, `layers.0-3.ffn.down`) or a tensor name with `*`.

    `weights` replace the weights of the experts that it names, `dtype` the element type. `line` is where the recipe's file has
    it.
    """

    match: str
    method: InstanceOf[MergeMethod]
    weights: dict[str, Finite] = Field(default_factory=dict)
    dtype: Float | None = None
    line: int | None = None


class Span(_Strict):
    """The layers `start` to `stop` (not included) of a model, by its name in the recipe."""

    model: str
    start: int = Field(ge=0)
    stop: int


class Slice(_Strict):
    """Layers of the result, merged from as many layers of each source; `base` names the one that is the common ancestor."""

    sources: tuple[Span, ...] = Field(min_length=1)
    base: str | None = None

    @property
    def layers(self) -> int:
        """Return the number of its layers."""
        return self.sources[0].stop - self.sources[0].start


class AdapterOutput(_Strict):
    """A LoRA as the result: its largest `rank` (default: that of the adapters), the `energy` to keep, its element type."""

    kind: Literal["adapter"]
    rank: int | None = Field(default=None, ge=1, strict=True)
    energy: float | None = Field(default=None, gt=0, le=1)
    dtype: Float = "float32"


def _output(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class Recipe(_Strict):
    """A recipe. `folder` is what relative paths start from, `written` the document as the user wrote it.

    `parts` are models by what is theirs alone: a part such as `vision`, or tensors by name; `drop` leaves it out.

    `tokens` are rows of single tokens, and `pad_to_multiple_of` what the number of rows is rounded up to; both stand in the
    `tokenizer` of a file.

    `routers` says where those of merged mixtures come from.

    `seed` is that of `merge`, for whatever is drawn outside of methods and routers.

    Models that are recipes themselves stand in `recipes` by name. A file of another program's gives `settings`, which decide
    instead of `method` and `overrides`; `slices`, of which a dense model is stacked; and, in `notes` and `warnings`, what its
    reader should know.
    """

    base: str | None = Field(default=None, min_length=1)
    base_adapter: str | None = Field(default=None, min_length=1)
    experts: dict[
        Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$", max_length=LONGEST_LABEL)],
        Annotated[Expert, BeforeValidator(_expert)],
    ] = Field(min_length=1)
    method: InstanceOf[MergeMethod]
    overrides: tuple[Override, ...] = ()
    moe: MoE | None = None
    routers: InstanceOf[Router] | None = None
    dtype: Literal["float32", "float16", "bfloat16", "float8"] | None = None
    calibration: dict[str, Annotated[str, Field(min_length=1)]] = Field(default_factory=dict)
    tokenizer: str | None = None
    tokens: dict[str, TokenRow] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = Field(default=None, min_length=1)
    config: str | None = None
    parts: dict[Annotated[str, Field(min_length=1)], str] = Field(default_factory=dict)
    output: Annotated[AdapterOutput | None, BeforeValidator(_output)] = None
    seed: int = 0
    folder: Path = Path()
    source: str = "recipe"
    written: dict[str, Any] = Field(default_factory=dict)
    learn: Learning | None = None
    learned: InstanceOf[MethodRule] | None = None
    settings: InstanceOf[MethodRule] | None = None
    slices: tuple[Slice, ...] = ()
    recipes: dict[str, InstanceOf[Recipe]] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def value_dtype(self) -> str | None:
        """The element type that tensors are merged into; None where the models decide."""
        return "bfloat16" if self.dtype == FLOAT8 else self.dtype

    @property
    def includes_base(self) -> bool:
        """Return whether the base is one of the MoE's experts."""
        if self.moe is None:
            return False
        if self.moe.include_base is None:
            return self.base is not None and self.moe.shared != "base"
        return self.moe.include_base

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The MoE's experts in the order of their indices."""
        return (*(("base",) if self.includes_base else ()), *self.experts)

    def text_request(self, experts: Sequence[str], statistics: Mapping[str, Path] | None = None) -> TextRequest:
        """The calibration text of these experts, for fitters to read, and what mixtures have of it."""
        return TextRequest(self.source, self.folder, self.calibration, tuple(experts), self.base is not None, statistics or {})

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """The main method and those of the overrides."""
        *special, general = self.rules
        return tuple(method for rule in (general, *special) for method in rule.methods)

    @property
    def rules(self) -> tuple[MethodRule, ...]:
        """Return the rules that decide about each tensor, in the order they are asked."""
        if self.settings is not None:
            return (self.settings,)
        overrides = (
            PatternRule(override.match, MethodChoice(override.method, override.weights, override.dtype))
            for override in self.overrides
        )
        return (*overrides, self.learned or PatternRule("", MethodChoice(self.method)))
