"""Keys of recipes for experts that stay whole models (MergeME, section 3.2), and those that do not go with them."""

from __future__ import annotations

from moerge.recipe.document import Key
from moerge.recipe.schema import UNION, Recipe
from moerge.routers.sequence import SequenceRouter

METHODS = ("average", "linear")
"""How a shared embedding and head can be made of the experts'."""


def conflicting_key(recipe: Recipe) -> tuple[Key, str] | None:
    """A key that does not go with whole models and what is wrong with it; None if nothing is."""
    return _conflict_in_moe(recipe) or _conflict_elsewhere(recipe)


def _conflict_in_moe(recipe: Recipe) -> tuple[Key, str] | None:
    moe = recipe.moe
    assert moe is not None
    given, router = moe.model_fields_set, moe.router
    for key in ("separate", "mix", "adapters"):
        if key in given:
            return ("moe", key), f" is about parts of experts of one architecture, and these stay whole models: remove '{key}'"
    if router.kind == "task_vector":
        return ("moe", "router", "kind"), ": task_vector compares experts of one architecture, and these stay whole models"
    if moe.embedding == "separate" and "projectors" in given:
        return ("moe", "projectors"), " has no effect with 'embedding: separate', which needs none: remove one of the two"
    if moe.route_on == "sequence" and "prefix_tokens" in given:
        return ("moe", "prefix_tokens"), " has no effect with 'route_on: sequence': remove one of the two"
    for key in ("route_on", "prefix_tokens"):
        if key in given and isinstance(router, SequenceRouter) and not router.scores:
            return ("moe", key), f" has no effect on {router.kind!r} routing, which reads no text: remove it"
    return None


def _conflict_elsewhere(recipe: Recipe) -> tuple[Key, str] | None:
    name, stay = recipe.method.name, "experts that stay whole models"
    if recipe.overrides:
        return ("merge", "overrides"), f": {stay} have no tensors to merge but embedding and head: remove 'overrides'"
    if name not in METHODS:
        return ("merge", "method"), (
            f": embedding and head of {stay} are averaged, so {name!r} does not apply: choose one of {', '.join(METHODS)}"
        )
    if recipe.learn is not None:
        return ("learn",), f": {stay} have no coefficients to learn: remove 'learn'"
    if recipe.config is not None:
        return ("config",), f": {stay} keep a config each: remove 'config'"
    if recipe.tokenizer == UNION or recipe.tokens or recipe.pad_to_multiple_of:
        return ("tokenizer",), f": {stay} share the tokenizer of one model as it is: give its name and no more"
    return None
