"""From a dense plan to what learning works on: each tensor with its task vectors and the coefficients that it learns."""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from moerge.errors import InputError
from moerge.execution.executor import Executor
from moerge.execution.schedule import Job, run_jobs
from moerge.learning.directions import Directions
from moerge.learning.model import MergedParameter
from moerge.methods.method import TaskVectorMethod
from moerge.operations.operations import Merge, Output
from moerge.planning.plan import Plan
from moerge.recipe.learning import Learning
from moerge.recipe.rules import matches
from moerge.recipe.schema import Recipe
from moerge.tensors.threads import default_threads

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


def merged_parameters(recipe: Recipe, plan: Plan, settings: Learning, pool: ThreadPoolExecutor) -> list[MergedParameter]:
    """A slot for each float tensor of the plan; those of the roles in `settings` learn, unless a MoE keeps them separate."""
    check_recipe(recipe)
    separate = recipe.moe.separate if recipe.moe else ()

    def has_role(roles: Sequence[str], output: Output) -> bool:
        return any(matches(role, output.role, output.name) for role in roles)

    slots = []
    for output in plan.outputs:
        merge = output.operation
        if not isinstance(merge, Merge) or merge.base is None:
            slots.append(MergedParameter(output.name, merge.sources[0]))
            continue
        routed = bool(output.role) and has_role(separate, output)
        learns = not routed and len(output.shape) == 2 and has_role(settings.roles, output)
        key = _key(output, settings.granularity) if learns else ""
        slots.append(MergedParameter(output.name, merge.base, Directions(merge, pool), key, routed))
    if not any(slot.key for slot in slots):
        raise InputError(f"{recipe.source}: {_why_none(recipe, plan, settings)}: nothing to learn")
    return _measured(slots)


def _why_none(recipe: Recipe, plan: Plan, settings: Learning) -> str:
    roles = f"learn.roles ({', '.join(settings.roles)})"
    matching = [output for output in plan.outputs if any(matches(role, output.role, output.name) for role in settings.roles)]
    if recipe.moe and any(len(output.shape) == 2 for output in matching):
        return f"moe.separate ({', '.join(recipe.moe.separate)}) keeps every matrix of {roles} separate"
    tied = "head" in settings.roles and plan.config.get("tie_word_embeddings")
    return f"no matrix has a role of {roles}" + ("; the head is the embedding, as tie_word_embeddings says" if tied else "")


def _key(output: Output, granularity: str) -> str:
    if granularity == "tensor":
        return output.name
    layer = _LAYER.search(output.role or output.name)
    return f"layers.{layer[1]}" if layer else output.name


def _measured(slots: Sequence[MergedParameter]) -> list[MergedParameter]:
    """The slots with what their methods need to know before they trim. What a MoE keeps separate has no part in that."""
    executor, found = Executor(), list(slots)
    merges = {i: slot.directions.merge for i, slot in enumerate(slots) if slot.directions is not None and not slot.routed}

    def measure(index: int, merge: Merge) -> Job:
        statistic = yield from executor.statistic(merge)
        slot = slots[index]
        assert slot.directions is not None
        found[index] = replace(slot, directions=replace(slot.directions, statistic=statistic))

    threads = default_threads()
    executor.measure_model(list(merges.values()), threads)
    run_jobs((measure(index, merge) for index, merge in merges.items()), threads)
    return found
