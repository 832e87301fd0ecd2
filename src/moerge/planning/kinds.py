"""The kind of result that a recipe asks for, which sometimes its models decide."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from moerge.architecture.config import STRUCTURAL
from moerge.checkpoint.expert import ExpertCheckpoint
from moerge.errors import InputError
from moerge.planning.models import SourceModel
from moerge.recipe.document import dotted
from moerge.recipe.heterogeneous import conflicting_key
from moerge.recipe.schema import MoE, Recipe
from moerge.routers.sequence import LearnedSequenceRouter, RandomSequenceRouter

Kind = Literal["dense", "token_routed", "sequence_routed", "heterogeneous"]


def kind(recipe: Recipe) -> Kind:
    """Return the kind of model that a resolved recipe makes."""
    if recipe.moe is None:
        return "dense"
    if not recipe.moe.by_sequence:
        return "token_routed"
    return "heterogeneous" if recipe.moe.asks_for_heterogeneous else "sequence_routed"


def resolve(recipe: Recipe, models: Sequence[SourceModel]) -> Recipe:
    """The recipe with what its models decide: that experts that are too different stay whole models, and what these make of keys.

    `random` and `learned` both draw a gate, which is what the paper starts from. Raises InputError for a key that does not go
    with such experts.
    """
    moe = recipe.moe
    if moe is None:
        return recipe
    if not is_heterogeneous(recipe, models):
        return recipe if moe.by_sequence else _with_top_k(recipe, moe, models)
    problem = conflicting_key(recipe)
    if problem:
        raise InputError(f"{recipe.source}: {dotted(problem[0])}{problem[1]}")
    changes: dict[str, Any] = {"embedding": moe.embedding}  # a recipe that says so asks for experts that stay whole models
    if isinstance(moe.router, RandomSequenceRouter):
        changes["router"] = LearnedSequenceRouter(temperature=moe.router.temperature, seed=moe.router.seed)
    if "top_k" not in moe.model_fields_set:
        changes["top_k"] = min(moe.top_k, len(recipe.expert_names))
    return recipe.model_copy(update={"moe": moe.model_copy(update=changes)})


def _with_top_k(recipe: Recipe, moe: MoE, models: Sequence[SourceModel]) -> Recipe:
    """The recipe with the top_k of the first mixture that experts come from, unless it says another or has fewer experts."""
    origins = (model.checkpoint for model in models if isinstance(model.checkpoint, ExpertCheckpoint))
    first = next(origins, None)
    top_k = None if first is None else first.mixture_config.get("num_experts_per_tok")
    if type(top_k) is not int or top_k < 1 or "top_k" in moe.model_fields_set:
        return recipe
    changed = moe.model_copy(update={"top_k": min(top_k, len(recipe.expert_names))})
    return recipe.model_copy(update={"moe": changed})


def is_heterogeneous(recipe: Recipe, models: Sequence[SourceModel]) -> bool:
    """Return whether this recipe's experts stay whole models: it says so, or it routes sequences and they are too different."""
    if recipe.moe is None or not recipe.moe.by_sequence:
        return False
    return recipe.moe.asks_for_heterogeneous or differ_in_architecture(models)


def differ_in_architecture(models: Sequence[SourceModel]) -> bool:
    """Return whether these models differ in type or shape, so that they cannot be merged tensor by tensor."""
    if len({model.model_type for model in models}) > 1:
        return True
    first, *others = (model.config for model in models)
    return any(config.get(key) != first.get(key) for key in STRUCTURAL - {"vocab_size"} for config in others)
