"""The models that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping

from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.checkpoint.quantised import refuse_quantised
from moerge.checkpoint.reader import Checkpoint, is_adapter
from moerge.errors import InputError
from moerge.recipe.schema import Recipe


def locate_models(recipe: Recipe, *, weights: bool, commits: Mapping[str, str | None]) -> tuple[Checkpoint, ...]:
    """All models of the recipe, the base first where there is one; adapters on the base.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched. Raises InputError if one cannot be opened, or is an adapter that does not fit the base.
    """
    locations = {"base": recipe.base} if recipe.base else {}
    locations |= {name: expert.model for name, expert in recipe.experts.items()}
    found = {
        name: locate(location, name=name, relative_to=recipe.folder, weights=weights, commit=commits.get(name))
        for name, location in locations.items()
    }
    for model in found.values():
        refuse_quantised(model)
    base = found.get("base")
    if base is not None and is_adapter(base):
        raise InputError(f"base: {base.folder} is an adapter: name the model that it was trained on{_trained_on(base)}")
    return tuple(_model(model, base, recipe.source) for model in found.values())


def _model(model: Checkpoint, base: Checkpoint | None, source: str) -> Checkpoint:
    if not is_adapter(model):
        return model
    if base is None:
        trained_on = f"the model that it was trained on{_trained_on(model)}"
        raise InputError(f"{source}: {model.name} is an adapter, so the recipe needs a 'base': {trained_on}")
    return apply_adapter(model, base)


def _trained_on(adapter: Checkpoint) -> str:
    named = adapter.config.get("base_model_name_or_path")
    return f" ({named})" if named else ""
