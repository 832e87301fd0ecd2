"""Routers of token-routed MoEs, as what fills the gate matrices."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from moerge.architecture.family import Expected
from moerge.planning.operations import Draw, Operation
from moerge.registry import Registry


class Router(BaseModel):
    """Where the gate matrices [experts, hidden] come from. Register a subclass under `moerge.routers`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    kind: ClassVar[str]
    needs_training: ClassVar[bool] = False

    def operation(self, gate: Expected) -> Operation:
        """What fills one layer's gate."""
        raise NotImplementedError


class RandomRouter(Router):
    """Uniform with mean 0 and standard deviation `std`, by default that of a fresh linear layer: 1 / sqrt(3 * hidden).

    The paper's starting point before fine-tuning and its baseline without. Inputs are normalised, so logits then have a
    standard deviation near 0.58 whatever the width, and the experts' outputs are mixed almost evenly.
    """

    kind: ClassVar[str] = "random"
    needs_training: ClassVar[bool] = True
    seed: int = 0
    std: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def operation(self, gate: Expected) -> Operation:
        """A draw that depends on the seed and the gate's name alone."""
        std = self.std if self.std is not None else 1 / math.sqrt(3 * gate.shape[1])
        return Draw(seed=self.seed, bound=math.sqrt(3) * std)


_ROUTERS: Registry[type[Router]] = Registry("moerge.routers", "router kind")


def router(kind: str) -> type[Router]:
    """The router class called `kind`; InputError suggests the nearest known one."""
    return _ROUTERS.get(kind)
