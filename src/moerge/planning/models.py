"""The models that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping

from moerge.checkpoint.locate import locate
from moerge.checkpoint.reader import Checkpoint
from moerge.recipe.schema import Recipe


def locate_models(recipe: Recipe, *, weights: bool, commits: Mapping[str, str | None]) -> tuple[Checkpoint, ...]:
    """All models of the recipe, the base first where there is one.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched. Raises InputError if one cannot be opened.
    """
    locations = {"base": recipe.base} if recipe.base else {}
    locations |= {name: expert.model for name, expert in recipe.experts.items()}
    return tuple(
        locate(location, name=name, relative_to=recipe.folder, weights=weights, commit=commits.get(name))
        for name, location in locations.items()
    )
