"""The operations that a plan is made of. A dense merge and a MoE are both lists of them, so one executor runs both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np

from moerge.methods.method import MergeMethod
from moerge.operations.fitter import Fitter
from moerge.tensors.random import stream_key
from moerge.tensors.source import Source
from moerge.tensors.spec import TensorSpec
from moerge.tensors.views.rows import OverwriteRows


@dataclass(frozen=True)
class Copy:
    """The bytes of one source, unchanged."""

    source: Source

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the sources that are read."""
        return (self.source,)


@dataclass(frozen=True)
class Merge:
    """A merge method over experts in the recipe's order; `base` where the method works on task vectors.

    `extras` are statistics for methods that want them, one for each expert or None where an expert has none: of the experts'
    shape, or of any shape for methods that are given whole tensors. Rows in `exact` are copied instead of merged.
    """

    method: MergeMethod
    experts: tuple[Source, ...]
    weights: tuple[float, ...]
    base: Source | None = None
    extras: tuple[Source | None, ...] = ()
    exact: OverwriteRows | None = None

    @property
    def values(self) -> tuple[Source, ...]:
        """The tensors that are merged, with the base first where there is one."""
        return self.experts if self.base is None else (self.base, *self.experts)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the sources that are read."""
        return (*self.values, *(extra for extra in self.extras if extra is not None))

    @property
    def weights_E(self) -> np.ndarray:
        """The weights as a method sees them."""
        return np.array(self.weights, np.float32)

    @property
    def keys_E(self) -> np.ndarray:
        """Random keys that depend on the seed, the expert and the tensor alone; empty for methods that draw nothing."""
        seed = self.method.random_seed
        keys = [stream_key(seed, s.model, s.tensor.name) for s in self.experts] if seed is not None else []
        return np.array(keys, np.uint64)


@dataclass(frozen=True)
class Draw:
    """Uniform random values in [-bound, bound), a function of the seed and the output's name.

    `what` is drawn, as the plan shows it.
    """

    seed: int
    bound: float
    what: str = ""

    @classmethod
    def of_linear(cls, inputs: int, seed: int = 0, std: float | None = None, what: str = "") -> Draw:
        """Draw as `torch.nn.Linear` does, weights and biases alike, within 1 / sqrt(inputs); or with this standard deviation."""
        return cls(seed, 1 / sqrt(inputs) if std is None else sqrt(3) * std, what)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Nothing is read."""
        return ()


@dataclass(frozen=True)
class Fit:
    """A tensor that `fitter` computes when all other outputs are there; until then it is zero.

    Fitters work one after the other, in the order in which their outputs stand in the plan.
    """

    fitter: Fitter

    @property
    def sources(self) -> tuple[Source, ...]:
        """Nothing is read block by block."""
        return ()


Operation = Copy | Merge | Draw | Fit


@dataclass(frozen=True)
class Output(TensorSpec):
    """A tensor of the result and the operation that computes it."""

    operation: Operation

    @property
    def work_bytes(self) -> int:
        """Bytes read and written on the way to this output, by all passes."""
        operation = self.operation
        measured = 0
        if isinstance(operation, Merge):
            measured = operation.method.measures * sum(source.tensor.nbytes for source in operation.values)
        return self.nbytes + measured + sum(source.tensor.nbytes for source in operation.sources)

    @property
    def action(self) -> str:
        """The operation in a word: a method's name, `copy`, `convert` (to another element type), `draw`, `zeros`, `fit`."""
        operation = self.operation
        if isinstance(operation, Fit):
            return "fit"
        if isinstance(operation, Merge):
            alone = len(operation.sources) == 1 and set(operation.weights) == {1.0}
            return "convert" if alone else operation.method.name
        if isinstance(operation, Draw):
            return "draw" if operation.bound else "zeros"
        return "copy"

    @property
    def hyperparameters(self) -> str:
        """The operation's settings in a line."""
        operation = self.operation
        if isinstance(operation, Draw):
            how = f"seed {operation.seed}, uniform within {operation.bound:.4g}" if operation.bound else ""
            return ", ".join(filter(None, (operation.what, how)))
        if isinstance(operation, Copy) or self.action == "convert":
            return ""
        if isinstance(operation, Fit):
            settings = {key: value for key, value in operation.fitter.settings.items() if value is not None}
            return ", ".join([operation.fitter.kind, *(f"{key} {value}" for key, value in settings.items())])
        weights = "" if set(operation.weights) == {1.0} else f", weights {', '.join(f'{w:g}' for w in operation.weights)}"
        return ", ".join(f"{key} {_short(value)}" for key, value in operation.method.described.items()) + weights


@dataclass(frozen=True)
class FitJob:
    """A fitter and the outputs that it computes, in the plan's order."""

    fitter: Fitter
    outputs: tuple[Output, ...]


def fit_jobs(outputs: Iterable[Output]) -> tuple[FitJob, ...]:
    """Group the outputs that are computed by their fitters, in the order of their first outputs."""
    groups: dict[int, list[Output]] = {}
    fitters: dict[int, Fitter] = {}
    for output in outputs:
        if isinstance(output.operation, Fit):
            fitter = output.operation.fitter
            fitters.setdefault(id(fitter), fitter)
            groups.setdefault(id(fitter), []).append(output)
    return tuple(FitJob(fitters[key], tuple(group)) for key, group in groups.items())


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(map(_short, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)
