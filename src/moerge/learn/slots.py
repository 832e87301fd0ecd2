"""From a dense plan to what learning works on: each tensor with its task vectors and the coefficients that it learns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.learn.directions import Directions
from moerge.learn.model import Slot
from moerge.learn.settings import Learning
from moerge.methods.method import MergeMethod, TaskVectorMethod
from moerge.planning.measuring import chunked, sampled
from moerge.planning.operations import Merge, Output
from moerge.planning.plan import Plan
from moerge.recipe.rules import matches
from moerge.recipe.schema import Recipe

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def check_recipe(recipe: Recipe) -> None:
    """InputError where coefficients cannot be learned for such a recipe."""
    method = recipe.method
    if not isinstance(method, TaskVectorMethod) or type(method).direct is TaskVectorMethod.direct:
        raise InputError(
            f"{recipe.source}: merge.method: learned coefficients weigh task vectors: use task_arithmetic, ties or dare, "
            f"not {method.name}"
        )
    if getattr(method, "aggregate", "sum") == "mean" or method.divides_by_weights:
        raise InputError(
            f"{recipe.source}: merge.aggregate is 'mean', which is no sum that coefficients could weigh: use 'sum'"
            if hasattr(method, "aggregate")
            else f"{recipe.source}: merge.normalize leaves no sum that coefficients could weigh: remove it"
        )
    if not 0 < method.scale < 1:
        raise InputError(
            f"{recipe.source}: merge.scale is where coefficients start, so it must lie between 0 and 1, not {method.scale:g}"
        )
    if recipe.overrides:
        raise InputError(f"{recipe.source}: merge.overrides cannot be combined with learned coefficients: remove them")
    weighted = [name for name, expert in recipe.experts.items() if expert.weight != 1]
    if weighted:
        raise InputError(f"{recipe.source}: experts.{weighted[0]} has a weight, but learning finds the weights: remove it")


def make_slots(recipe: Recipe, plan: Plan, settings: Learning, pool: ThreadPoolExecutor) -> list[Slot]:
    """A slot for each float tensor of the plan; those of the roles in `settings` learn, unless a MoE keeps them separate."""
    check_recipe(recipe)
    separate = recipe.moe.separate if recipe.moe else ()
    method = recipe.method.for_experts(tuple(recipe.experts))
    assert isinstance(method, TaskVectorMethod)
    merges: list[Merge] = []
    slots, still = [], []
    for output in plan.outputs:
        operation = output.operation
        if not isinstance(operation, Merge) or operation.base is None:
            still.append(Slot(Directions(output.name, operation.sources[0].tensor, (), (), method, pool)))
            continue
        merges.append(operation)
        experts = tuple(source.tensor for source in operation.experts)
        names = tuple(source.model for source in operation.experts)
        directions = Directions(output.name, operation.base.tensor, experts, names, method, pool)
        own = any(matches(role, output.role, output.name) for role in separate) if output.role else False
        learns = not own and len(output.shape) == 2 and any(matches(role, output.role, output.name) for role in settings.roles)
        slots.append(Slot(directions, _key(output, settings.granularity) if learns else "", own))
    if not any(slot.key for slot in slots):
        raise InputError(f"{recipe.source}: no matrix has a role of learn.roles ({', '.join(settings.roles)}): nothing to learn")
    return still + _measured(slots, merges)


def _key(output: Output, granularity: str) -> str:
    if granularity == "tensor":
        return output.name
    layer = _LAYER.search(output.role or output.name)
    return f"layers.{layer[1]}" if layer else output.name


def _measured(slots: Sequence[Slot], operations: Sequence[Merge]) -> list[Slot]:
    """The slots with what their method needs to know of a tensor, or of the model, before it trims."""
    method: Any = operations[0].method
    if not method.measures:
        return list(slots)
    if method.spans_model:
        statistic = measure(method, operations, slots)
        return [replace(slot, directions=replace(slot.directions, statistic=statistic)) for slot in slots]
    return [
        replace(slot, directions=replace(slot.directions, statistic=measure(method, [operation], [slot])))
        for slot, operation in zip(slots, operations, strict=True)
    ]


def measure(method: MergeMethod, operations: Sequence[Merge], slots: Sequence[Slot]) -> Any:
    """What `method.measure` returns for these operations together; task vectors are read a tensor at a time."""
    size = sum(slot.directions.size for slot in slots)
    steps = method.measure(len(slots[0].directions.experts), size)
    total: Any = None
    try:
        while True:
            statistic = steps.send(total)
            total = statistic.zeros()
            pieces = sampled(operations, statistic.runs) if statistic.runs else chunked(operations)
            for slot, operation in zip(slots, operations, strict=True):
                tau_KN = slot.directions.raw()
                for piece in pieces:
                    if piece.operation is operation:
                        share = statistic.zeros()
                        statistic.add(np.ascontiguousarray(tau_KN[:, piece.start : piece.stop]), share)
                        total += share
    except StopIteration as finished:
        return finished.value
