"""The tensors that are compared: those that a dense merge of the recipe's models would merge, whatever the recipe makes of
them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.methods.method import MergeMethod
from moerge.methods.ties import Ties
from moerge.methods.values import Values, numbers
from moerge.operations.operations import Merge, Output
from moerge.planning.build import build_plan, located
from moerge.planning.kinds import differ_in_architecture
from moerge.planning.plan import Plan
from moerge.planning.resolver import MethodResolver
from moerge.recipe.rules import MethodChoice, MethodRule, TensorContext
from moerge.recipe.schema import Recipe

_LAYER = re.compile(r"(?:^|.*?\.)(\d+)\.(.+)")
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Part:
    """The place of a tensor: its layer (None outside of layers), its part (`attention.q`), and its role (`attention`).

    Of a family that moerge does not know, the role is the first part of the tensor's name in its layer.
    """

    layer: int | None
    name: str
    role: str


def part_of(output: Output) -> Part:
    """Return the place of an output. The experts of a MoE count as one part."""
    path = output.role or output.name.removesuffix(".weight").removeprefix("model.")
    match = _LAYER.fullmatch(path)
    layer, name = (int(match[1]), match[2]) if match else (None, path)
    name = _INDEX.sub("*", name)
    return Part(layer, name, name.split(".")[0])


def compared_plan(
    recipe: Recipe,
    *,
    density: float | None = None,
    weights: bool = False,
    commits: Mapping[str, str | None] | None = None,
) -> Plan:
    """A plan whose merges are TIES of all experts' task vectors or, without a base, averages of their parameters.

    TIES trims to `density`, by default that of the recipe's method for the tensor, or nothing where it has none. No method gets
    the statistics or texts that it would need. `weights` and `commits` are as in `build_plan`. Raises InputError for models that
    cannot be merged tensor by tensor, and for what is wrong with the recipe's overrides.
    """
    if recipe.moe is not None and recipe.moe.by_sequence and differ_in_architecture(located(recipe)):
        raise InputError(
            f"{recipe.source}: these experts differ in type or shape and stay whole models, so there are no tensors of theirs to "
            "compare: name those that are alike in a recipe of their own"
        )
    resolver = MethodResolver(recipe)
    rule = _AsTies(recipe, resolver, density)
    changes: dict[str, Any] = {"moe": None, "calibration": {}, "learn": None, "learned": None, "settings": rule}
    plan = build_plan(recipe.model_copy(update=changes), weights=weights, commits=commits, bind=False)
    resolver.check_all_used()
    outputs = tuple(output for output in plan.outputs if _is_merge(output))
    if not any(len(operation.experts) > 1 for operation in map(operation_of, outputs)):
        raise InputError(f"{recipe.source}: there is nothing to compare: it needs two experts that share a tensor")
    return replace(plan, recipe=recipe, outputs=outputs)


def operation_of(output: Output) -> Merge:
    """The merge that an output of a compared plan is."""
    assert isinstance(output.operation, Merge)
    return output.operation


def _is_merge(output: Output) -> bool:
    """Return whether there is something to compare; an empty tensor, or that of one model without a base, has nothing."""
    operation = output.operation
    return isinstance(operation, Merge) and len(operation.values) > 1 and output.size > 0


@dataclass(frozen=True)
class _AsTies(MethodRule):
    """The recipe's own choice, as TIES with its density, scope and weights."""

    recipe: Recipe
    resolver: MethodResolver
    density: float | None

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """TIES, as far as that is known without a model."""
        return (Ties(),)

    def choose(self, context: TensorContext) -> MethodChoice:
        """TIES where there is a base, the average where there is none."""
        choice = self.resolver.choose(context)
        if not self._has_base(context):
            return MethodChoice(Average(), choice.weights)
        density: Values = getattr(choice.method, "density", 1.0) if self.density is None else self.density
        spans_model = getattr(choice.method, "scope", "tensor") == "model"
        return MethodChoice(Ties(density=density, scope="model" if spans_model else "tensor"), choice.weights)

    def _has_base(self, context: TensorContext) -> bool:
        slices = self.recipe.slices
        return slices[context.slice_index].base is not None if slices else self.recipe.base is not None


def densities(plan: Plan) -> tuple[float, ...]:
    """The densities that TIES has in a compared plan, the smallest first; none without a base."""
    methods = {operation_of(output).method for output in plan.outputs}
    found: set[float] = set()
    for method in methods:
        if isinstance(method, Ties):
            found |= {float(value) for value in numbers(method.density)}
    return tuple(sorted(found))
