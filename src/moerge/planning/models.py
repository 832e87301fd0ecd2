"""The models that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.checkpoint.quantised import refuse_quantised
from moerge.checkpoint.reader import Checkpoint, is_adapter
from moerge.errors import InputError
from moerge.planning.merged import merged_checkpoint
from moerge.planning.plan import Plan
from moerge.recipe.schema import Recipe

Commits = Mapping[str, str | None]
Build = Callable[[Recipe, Commits], Plan]


def locate_models(recipe: Recipe, *, weights: bool, commits: Commits, build: Build) -> tuple[Checkpoint, ...]:
    """All models of the recipe, the base first where there is one; adapters on the base or on the model they are given with.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched. Models that are recipes are planned by `build`. Raises InputError if one cannot be opened, or is an
    adapter that does not fit.
    """
    locations = {"base": recipe.base} if recipe.base else {}
    locations |= {name: expert.model for name, expert in recipe.experts.items()}
    found: dict[str, Checkpoint] = {}
    for name, location in locations.items():
        if name in recipe.recipes:
            found[name] = merged_checkpoint(build(recipe.recipes[name], _inside(commits, name)), name, location)
        else:
            found[name] = locate(location, name=name, relative_to=recipe.folder, weights=weights, commit=commits.get(name))
    for model in found.values():
        refuse_quantised(model)
    base = found.get("base")
    if base is not None and recipe.base_adapter is not None:
        base = found["base"] = _adapted(recipe, base, recipe.base_adapter, weights, commits)
    if base is not None and is_adapter(base):
        raise InputError(f"base: {base.folder} is an adapter: name the model that it was trained on{_trained_on(base)}")
    models = {name: _model(model, base, recipe.source) for name, model in found.items()}
    for name, expert in recipe.experts.items():
        if expert.adapter is not None:
            models[name] = _adapted(recipe, models[name], expert.adapter, weights, commits)
    return tuple(models.values())


def _inside(commits: Commits, name: str) -> Commits:
    """The commits of the models of one that is a recipe."""
    return {key.removeprefix(f"{name}/"): commit for key, commit in commits.items() if key.startswith(f"{name}/")}


def _adapted(recipe: Recipe, model: Checkpoint, location: str, weights: bool, commits: Commits) -> Checkpoint:
    """A model with an adapter of its own."""
    commit = commits.get(f"{model.name}+adapter")
    adapter = locate(location, name=model.name, relative_to=recipe.folder, weights=weights, commit=commit)
    if not is_adapter(adapter):
        raise InputError(f"{recipe.source}: adapter of {model.name}: {adapter.folder} is a whole model, not an adapter")
    made = apply_adapter(adapter, model)
    return replace(made, location=f"{model.location}+{location}", complete=made.complete and model.complete)


def _model(model: Checkpoint, base: Checkpoint | None, source: str) -> Checkpoint:
    if not is_adapter(model):
        return model
    if base is None:
        trained_on = f"the model that it was trained on{_trained_on(model)}"
        raise InputError(
            f"{source}: {model.name} is an adapter, so the recipe needs a 'base', {trained_on}, or this expert a 'model' and an "
            "'adapter' on it"
        )
    return apply_adapter(model, base)


def _trained_on(adapter: Checkpoint) -> str:
    named = adapter.config.get("base_model_name_or_path")
    return f" ({named})" if named else ""
