"""Routers of token-routed MoEs, as what fills the gate matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from moerge.architecture.family import ExpectedTensor
from moerge.operations.fitter import Fitter
from moerge.operations.operations import Draw, Fit, Operation
from moerge.registry import Registry

if TYPE_CHECKING:
    from moerge.texts import Texts

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
"""What scores are divided by before a softmax. Beyond these bounds they overflow, or say nothing any more."""
Std = Annotated[float, Field(gt=0, le=100)]
"""A standard deviation of weights."""


class Router(BaseModel):
    """The source of the gate matrices [experts, hidden]. Register a subclass under `moerge.routers`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    needs_training: ClassVar[bool] = False

    def operation(self, gate: ExpectedTensor) -> Operation:
        """Return the operation that fills one layer's gate."""
        raise NotImplementedError


class RandomRouter(Router):
    """Uniform with mean 0 and standard deviation `std`, by default that of a fresh linear layer: 1 / sqrt(3 * hidden).

    The paper's starting point before fine-tuning and its baseline without. Inputs are normalized, so logits then have a
    standard deviation near 0.58 whatever the width, and the experts' outputs are mixed almost evenly.
    """

    kind: ClassVar[str] = "random"
    needs_training: ClassVar[bool] = True
    seed: int = 0
    std: Std | None = None

    def operation(self, gate: ExpectedTensor) -> Operation:
        """A draw that depends on the seed and the gate's name alone."""
        return Draw.of_linear(gate.shape[1], self.seed, self.std)


class KeepRouter(Router):
    """The rows that the experts have in the mixtures that they come from, byte for byte: for experts named as MIXTURE#EXPERT.

    A mixture whose experts are dropped, reordered or repeated routes as before among those that stay: where the weights of the
    chosen experts are made to add up to 1, a token whose experts all stay gets the same output.
    """

    kind: ClassVar[str] = "keep"


class FittedRouter(Router, Fitter):
    """A router whose gates are computed once every other tensor of the merged model is written.

    A subclass says in `fit` what they are, float32 [experts, hidden] for each of `context.outputs` by name; the rest is as
    `Fitter` has it.
    """

    @property
    def title(self) -> str:
        """Return the recipe's name for it."""
        return f"the {self.kind} router"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its keys in the recipe."""
        return dict(self)

    def steps(self, calibration: Sequence[Texts]) -> int:
        """All texts that there are."""
        return sum(len(texts.documents) for texts in calibration)

    def operation(self, gate: ExpectedTensor) -> Operation:
        """Room for the gate, which `fit` fills later."""
        return Fit(self)


_ROUTERS: Registry[type[Router]] = Registry("moerge.routers", "router kind")


def router(kind: str) -> type[Router]:
    """The router class called `kind`; InputError suggests the nearest known one."""
    return _ROUTERS.get(kind)


def routers() -> list[str]:
    """Names of all kinds of routers, built-in and from other packages."""
    return _ROUTERS.names()
