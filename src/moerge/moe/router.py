"""Routers of token-routed MoEs, as what fills the gate matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from moerge.architecture.family import Expected
from moerge.planning.operations import Draw, Fit, Operation
from moerge.registry import Registry

if TYPE_CHECKING:
    from moerge.calibration import Texts
    from moerge.moe.context import FitContext
    from moerge.recipe.schema import Recipe

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


MODULE = re.compile(r"\.ffn\.(\d+)\.")
"""The number of the expert in a role such as `layers.3.ffn.1.up`."""


@dataclass(frozen=True)
class MoESize:
    """How large a merged model is: `shared` and `module` count the parameters of the backbone and of one expert's modules."""

    nbytes: int
    layers: int
    hidden: int
    vocabulary: int
    experts: int
    shared: int
    module: int


class Router(BaseModel):
    """Where the gate matrices [experts, hidden] come from. Register a subclass under `moerge.routers`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    needs_training: ClassVar[bool] = False

    def operation(self, gate: Expected) -> Operation:
        """What fills one layer's gate."""
        raise NotImplementedError

    def inputs(self, recipe: Recipe, experts: Sequence[str]) -> tuple[Texts, ...]:
        """The calibration text of the experts, read while planning; InputError if something is missing."""
        return ()

    @property
    def runs_model(self) -> bool:
        """Whether the merged model is loaded to compute the gates."""
        return False

    def require(self) -> None:
        """InputError if a package that the router needs is not installed; asked before anything is written."""

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """What computing the gates holds in memory."""
        return 0

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Floating-point operations that computing the gates takes, roughly."""
        return 0.0


class RandomRouter(Router):
    """Uniform with mean 0 and standard deviation `std`, by default that of a fresh linear layer: 1 / sqrt(3 * hidden).

    The paper's starting point before fine-tuning and its baseline without. Inputs are normalised, so logits then have a
    standard deviation near 0.58 whatever the width, and the experts' outputs are mixed almost evenly.
    """

    kind: ClassVar[str] = "random"
    needs_training: ClassVar[bool] = True
    seed: int = 0
    std: Positive | None = None

    def operation(self, gate: Expected) -> Operation:
        """A draw that depends on the seed and the gate's name alone."""
        std = self.std if self.std is not None else 1 / math.sqrt(3 * gate.shape[1])
        return Draw(seed=self.seed, bound=math.sqrt(3) * std)


class FittedRouter(Router):
    """A router whose gates are computed once every other tensor of the merged model is written.

    A subclass says in `fit` what they are, in `inputs` what text that takes, and in `memory_bytes` and `operations` what it
    costs.
    """

    def operation(self, gate: Expected) -> Operation:
        """Room for the gate, which `fit` fills later."""
        return Fit(self)

    def remarks(self, context: FitContext) -> tuple[str, ...]:
        """Warnings about the fitted gates, the same whether `fit` ran now or before an interruption."""
        return ()

    def fit(self, context: FitContext) -> Mapping[str, np.ndarray]:
        """float32 [experts, hidden] for each of `context.gates` by name."""
        raise NotImplementedError


_ROUTERS: Registry[type[Router]] = Registry("moerge.routers", "router kind")


def router(kind: str) -> type[Router]:
    """The router class called `kind`; InputError suggests the nearest known one."""
    return _ROUTERS.get(kind)


def routers() -> list[str]:
    """Names of all kinds of routers, built-in and from other packages."""
    return _ROUTERS.names()
