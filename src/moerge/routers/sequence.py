"""Kinds of routing of a sequence-routed model, as recipes name them; the model itself is in `moerge.modeling`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field

from moerge.architecture.family import ExpectedTensor
from moerge.errors import suggest
from moerge.operations.operations import Draw, Operation
from moerge.registry import Registry
from moerge.routers.base import Router, Std, Temperature

FORMAT = "moerge"
"""The value of `moe.format` that asks for a sequence-routed model."""


class SequenceRouter(Router):
    """The weighing of experts by a sequence-routed model; registered under `moerge.sequence_routers`.

    The model computes the weights when it is used, so it has to know the kind too, or that which it `routes_as`. `scores` says
    whether experts get scores of which the top K count.
    """

    scores: ClassVar[bool] = True
    routes_as: ClassVar[str | None] = None
    not_in_config: ClassVar[frozenset[str]] = frozenset()

    def routing(self, top_k: int) -> dict[str, Any]:
        """`routing` of the model's config.json."""
        options = self.model_dump(exclude_none=True, exclude=set(self.not_in_config))
        return {"kind": self.routes_as or self.kind, **({"top_k": top_k} if self.scores else {}), **options}

    def problem(self, experts: Sequence[str], separate: Sequence[str]) -> tuple[str, str] | None:
        """The key at fault and what is wrong with it, given the rest of the recipe; None if nothing is."""
        return None


class PerplexitySequenceRouter(SequenceRouter):
    """softmax(top-K(1 / PPL)), PPL of the prompt under each expert (MergeME, section 3.1.3)."""

    kind: ClassVar[str] = "perplexity"
    temperature: Temperature = 1.0


class TaskVectorSequenceRouter(SequenceRouter):
    """softmax(top-K(cos(-g, tau))), g the gradient of the base's loss on the prompt (MergeME, section 3.1.3)."""

    kind: ClassVar[str] = "task_vector"
    temperature: Temperature = 1.0
    roles: Annotated[list[str], Field(min_length=1)] | None = None
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None

    def problem(self, experts: Sequence[str], separate: Sequence[str]) -> tuple[str, str] | None:
        """It needs the base among the experts, and roles that are separate."""
        if "base" not in experts:
            return "kind", " task_vector measures from the base, so it has to be one of the experts: name a 'base' and include it"
        for role in self.roles or ():
            if role not in separate:
                return "roles", f": {role!r} is not separate, so its task vectors are not there, {suggest(role, separate)}"
        return None


class RandomSequenceRouter(SequenceRouter):
    """Scores drawn from the prompt's tokens and the seed."""

    kind: ClassVar[str] = "random"
    temperature: Temperature = 1.0
    seed: int = 0


class UniformSequenceRouter(SequenceRouter):
    """Every expert, all with the same weight."""

    kind: ClassVar[str] = "uniform"
    scores: ClassVar[bool] = False


class FixedSequenceRouter(SequenceRouter):
    """One expert for every sequence."""

    kind: ClassVar[str] = "fixed"
    scores: ClassVar[bool] = False
    expert: str

    def problem(self, experts: Sequence[str], separate: Sequence[str]) -> tuple[str, str] | None:
        """The expert has to exist."""
        if self.expert in experts:
            return None
        return "expert", f": {self.expert!r} is not an expert of this recipe, {suggest(self.expert, experts)}"


class LearnedSequenceRouter(SequenceRouter):
    """A gate on the mean input embedding of the prompt, drawn as the random router of token-routed models is."""

    kind: ClassVar[str] = "learned"
    needs_training: ClassVar[bool] = True
    not_in_config: ClassVar[frozenset[str]] = frozenset({"seed", "std"})
    temperature: Temperature = 1.0
    seed: int = 0
    std: Std | None = None

    def operation(self, gate: ExpectedTensor) -> Operation:
        """A draw that depends on the seed and the gate's name alone."""
        return Draw.of_linear(gate.shape[1], self.seed, self.std)


_SEQUENCE_ROUTERS: Registry[type[SequenceRouter]] = Registry("moerge.sequence_routers", "sequence router kind")


def sequence_router(kind: str) -> type[SequenceRouter]:
    """The class of the routing called `kind`; InputError suggests the nearest known one."""
    return _SEQUENCE_ROUTERS.get(kind)


def sequence_routers() -> list[str]:
    """Names of all kinds of routing, built-in and from other packages."""
    return _SEQUENCE_ROUTERS.names()
