"""TUNE.yaml: what is trained, on what, towards what. Shapes nowhere; nothing here needs torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from moerge.errors import Code, InputError, suggest
from moerge.files import LONGEST_LABEL, as_path
from moerge.recipe.document import Document, plain_copy, read_document

PARTS = ("router", "projectors", "experts", "backbone", "all")
"""What `train` can name besides patterns."""

MOST_SEQUENCES = 10**9
"""The most sequences of a run: each takes eight bytes of memory, and briefly five more."""

_SEEDS = 2**32
"""What transformers takes."""

_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def _number(value: Any) -> Any:
    """YAML reads 1e-5 as text: the dot is missing."""
    return float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value


def _whole(value: Any) -> Any:
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _listed(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split("+"))
    return tuple(value) if isinstance(value, list) else value


Positive = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Train = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_listed), Field(min_length=1)]
Layers = Annotated[tuple[Count, ...], BeforeValidator(lambda value: () if value == "middle" else _listed(value))]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Source(_Strict):
    """Text to train on: files (`path`: txt, jsonl, parquet, a folder or glob) or a Hub dataset (`hub`, streamed).

    `weight` is the relative probability of drawing a sequence from here (the columns of the paper's table 5). `teacher` is the
    model that distillation pulls to on this text. `field` is where the text is in jsonl, parquet and Hub datasets; `subset` and
    `split` say what of a Hub dataset is read.
    """

    path: str | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    field: str = "text"
    weight: Positive = 1.0
    teacher: str | None = None


class Distillation(_Strict):
    """Forward KL from the teachers' `top` largest logits at a `temperature`, and `hidden` times a distance of hidden states.

    `hidden_layers` are numbers of layers, counted from 1, or `middle`.
    """

    weight: NonNegative = 0.0
    top: Count = 64
    temperature: Positive = 1.0
    hidden: NonNegative = 0.0
    hidden_layers: Layers = ()


class Losses(_Strict):
    """Weights of what is added up. The paper's recipe is cross-entropy alone; it names load balancing as what it misses."""

    cross_entropy: NonNegative = 1.0
    load_balance: NonNegative = 0.0
    router_z: NonNegative = 0.0
    distillation: Distillation = Distillation()


class Adapters(_Strict):
    """LoRA adapters (Hu et al. 2022) that are trained instead of the weights of `target`: parts or names, as in `train`.

    The change of a weight is alpha / rank * B @ A, with `rslora` alpha / sqrt(rank); `alpha` is twice the rank by default.
    Experts that lie in one tensor get factors each. `save` says what OUT is: the model with the adapters merged, or a folder
    with the adapters alone, as peft writes it.
    """

    rank: Count = 16
    alpha: Positive | None = None
    rslora: bool = False
    target: Train = ("all",)
    save: Literal["merged", "adapter"] = "merged"


class UnfreezeStep(_Strict):
    """From this step on (0 is the first) these parts are trained too."""

    step: Count
    train: Train


class Tuning(_Strict):
    """All settings. Defaults are the paper's where it has one (appendix A): all parameters, AdamW, 1e-5, weight decay 0.01.

    `batch` is the number of sequences of an optimiser step over all processes; `accumulation` divides it into parts that run
    one after the other. `steps` or `tokens` says how long. `dtype` is what is computed in; the trained weights and AdamW's
    moments are float32 whatever it is. `sharding: fsdp2` gives each process a part of every parameter. `adapters` are trained
    instead of weights. `save_dtype` is what OUT stores, by default what the model is stored in. `heldout` are texts by name
    the cross-entropy of whose sequences' second halves is measured before the first step, every `evaluate_every` steps and after
    the last. `dying` is the fraction of an even share below which an expert counts as dying.
    """

    model: Annotated[str, Field(min_length=1)]
    data: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=LONGEST_LABEL)], Source], Field(min_length=1)]
    train: Train = ("all",)
    opens: Annotated[tuple[UnfreezeStep, ...], Field(strict=False)] = ()
    adapters: Adapters | None = None
    losses: Losses = Losses()
    learning_rate: Positive = 1e-5
    weight_decay: NonNegative = 0.01
    clip: NonNegative = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, BeforeValidator(_whole), Field(ge=0)] = 0
    batch: Count = 8
    accumulation: Count = 1
    length: Annotated[int, BeforeValidator(_whole), Field(ge=2)] = 2048
    steps: Count | None = None
    tokens: Count | None = None
    shuffle: bool = True
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    save_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    device: str | None = None
    processes: Count | None = None
    sharding: Literal["none", "fsdp2"] = "none"
    save_every: Count = 500
    heldout: dict[Annotated[str, Field(pattern=r"^[\w.-]+$", max_length=LONGEST_LABEL)], str] = Field(default_factory=dict)
    heldout_sequences: Count = 32
    evaluate_every: Count = 100
    dying: Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)] = 0.1
    seed: Annotated[int, Field(ge=0, lt=_SEEDS)] = 0

    @property
    def trains(self) -> tuple[str, ...]:
        """Return the parts that are trained from the beginning beside adapters: where there are some, nothing that was not
        named.
        """
        return () if self.adapters and "train" not in self.model_fields_set else self.train

    @property
    def total_steps(self) -> int:
        """Optimiser steps; a last one that `tokens` fills only in part counts."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.batch * self.length))

    @property
    def sequences(self) -> int:
        """Sequences that are drawn in all."""
        return self.total_steps * self.batch

    @property
    def distils(self) -> bool:
        """Return whether teachers are needed."""
        return self.losses.distillation.weight > 0 or self.losses.distillation.hidden > 0


@dataclass(frozen=True)
class TuneConfig:
    """Settings, and where they stand. Relative paths start from `folder`."""

    settings: Tuning
    document: Document
    folder: Path

    def error(self, path: tuple[str | int, ...], message: str, code: Code | None = None) -> InputError:
        """An error that names the line."""
        return self.document.error(path, message, code)


def load_tuning(tuning: str | Path | Mapping[str, Any], *, seed: int | None = None) -> TuneConfig:
    """Settings from a YAML file or the same structure as a dict. Raises InputError that names the line and key at fault."""
    if isinstance(tuning, Mapping):
        document, folder = Document(plain_copy(tuning, "tuning"), "tuning"), Path()
    else:
        path = as_path(tuning, "a tuning file")
        document, folder = read_document(path, "tuning file"), path.parent
    data = dict(document.data)
    for key in data:
        if key not in Tuning.model_fields:
            raise document.error((str(key),), f": unknown key, {suggest(str(key), Tuning.model_fields)}", code="unknown-name")
    if seed is not None and not 0 <= seed < _SEEDS:
        raise InputError(f"the seed should be from 0 to {_SEEDS - 1}, not {seed}")
    if seed is not None:
        data["seed"] = seed
    if isinstance(data.get("data"), dict):
        data["data"] = {str(k): {"path": v} if isinstance(v, str) else v for k, v in data["data"].items()}
    tune_config = TuneConfig(document.build(Tuning, data), document, folder)
    _check(tune_config)
    return tune_config


def _check(tune_config: TuneConfig) -> None:
    settings, error = tune_config.settings, tune_config.error
    if (settings.steps is None) == (settings.tokens is None):
        raise error(("steps" if settings.steps else "model",), ": say how long to train, with either 'steps' or 'tokens'")
    if settings.sequences > MOST_SEQUENCES:
        key, most = "steps" if settings.steps else "tokens", f"{MOST_SEQUENCES:,}"
        raise error((key,), f" means {settings.sequences:,} sequences, and a run can have {most}: lower it, or batch")
    for name, source in settings.data.items():
        _check_source(tune_config, name, source)
    late = next((index for index, opening in enumerate(settings.opens) if opening.step >= settings.total_steps), None)
    if late is not None:
        last = settings.total_steps - 1
        raise error(("opens", late, "step"), f" is {settings.opens[late].step}, which never comes: the last step is {last}")
    if settings.batch % settings.accumulation:
        raise error(("accumulation",), f" is {settings.accumulation}, which does not divide batch {settings.batch}")
    if settings.adapters:
        _check_adapters(tune_config, settings.adapters)
    losses = settings.losses
    if losses.cross_entropy == losses.distillation.weight == losses.distillation.hidden == 0:
        raise error(("losses",), ": nothing says what text looks like: give cross_entropy or distillation a weight")


def _check_source(tune_config: TuneConfig, name: str, source: Source) -> None:
    error, distils = tune_config.error, tune_config.settings.distils
    if (source.path is None) == (source.hub is None):
        raise error(("data", name), " needs either a 'path' or a 'hub' dataset")
    written = source.model_fields_set
    for key in ("subset", "split"):
        if source.path is not None and key in written:
            raise error(("data", name, key), " says what of a 'hub' dataset is read, and this source is a 'path': remove it")
    if source.path is not None and source.path.endswith(".txt") and "field" in written:
        raise error(("data", name, "field"), " says where the text is in jsonl and parquet, and this is txt: remove it")
    if distils and source.teacher is None:
        raise error(("data", name), " has no teacher: distillation needs one for every source; for general text, the base")
    if source.teacher is not None and not distils:
        raise error(("data", name, "teacher"), " teaches nothing: give losses.distillation a weight, or remove it")


def _check_adapters(tune_config: TuneConfig, adapters: Adapters) -> None:
    settings, error = tune_config.settings, tune_config.error
    if "router" in adapters.target:
        raise error(("adapters", "target"), " names the router, which is small: train it whole, with 'train: router'")
    if adapters.save == "adapter" and (settings.trains or settings.opens):
        key = "train" if settings.trains else "opens"
        raise error((key,), " trains weights too, which have no place in an adapter: remove it, or use 'save: merged'")
    if adapters.save == "adapter" and settings.save_dtype:
        raise error(("save_dtype",), " has no effect on adapters, which are stored in float32: remove it")
