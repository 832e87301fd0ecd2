"""A point of a search as a recipe."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.architecture.sequence import BY_SEQUENCE
from moerge.errors import InputError
from moerge.evaluation.run import GIVEN
from moerge.planning.build import build_plan
from moerge.planning.equivalent import equivalent_recipe
from moerge.planning.plan import Plan
from moerge.recipe import load_recipe
from moerge.searching.settings import WEIGHTS, Choice, Range, SearchFile, SmoothWeights, parameters

Point = Mapping[str, Any]
_STEP = re.compile(r"([^.\[\]]+)|\[(\d+)\]")
_PATHS = (
    "base",
    "experts",
    "calibration",
    "model",
    "adapter",
    "tokenizer",
    "chat_template",
    "path",
    "statistics",
    "coefficients",
)
"""Keys of a recipe below which a text may be a path."""


@dataclass(frozen=True)
class Space:
    """A recipe and the parameters that are searched. `recipe` has absolute paths; `kinds` are by parameter name."""

    recipe: Mapping[str, Any]
    source: str
    kinds: Mapping[str, Range | Choice]
    smooth: SmoothWeights | None
    experts: tuple[str, ...]
    layers: int
    by_sequence: bool

    def plan(self, point: Point) -> Plan:
        """The plan of a point."""
        return build_plan(load_recipe(self.recipe_of(point)), weights=True)

    def own_plan(self) -> Plan:
        """The plan of the recipe as it is."""
        return build_plan(load_recipe(self.recipe), weights=True)

    def recipe_of(self, point: Point) -> dict[str, Any]:
        """The recipe with the point's values, as a dict whose paths are absolute."""
        recipe: dict[str, Any] = deepcopy(dict(self.recipe))
        for name, value in point.items():
            if name.split(".", 1)[0] != WEIGHTS or self.smooth is None:
                put(recipe, name, value)
        if self.smooth is not None:
            _add_weights(recipe, self.smooth, self.experts, self.layers, point)
        return recipe

    @property
    def given(self) -> int:
        """Characters of a document that are read before any is predicted: sequence-routed models route by them."""
        return GIVEN if self.by_sequence else 0

    def start(self) -> dict[str, Any]:
        """The point that is the recipe itself, for as many parameters as have a value there that the search may take."""
        found = {}
        for name, kind in self.kinds.items():
            value = 1.0 if self.smooth is not None and name.startswith(f"{WEIGHTS}.") else get(self.recipe, name)
            allowed = value in kind.choice if isinstance(kind, Choice) else _within(kind, value)
            if value is not None and allowed:
                found[name] = value
        return found


def read_space(file: SearchFile) -> Space:
    """The recipe of a search and its parameters. Raises InputError where the recipe or a path into it is at fault."""
    recipe = file.settings.recipe
    loaded = load_recipe(file.place(recipe) if isinstance(recipe, str) else recipe)
    plan = build_plan(loaded)
    folder = loaded.folder if isinstance(recipe, str) else file.folder
    written = with_paths(equivalent_recipe(plan), folder, None)
    kinds, smooth = parameters(file), None
    flat: dict[str, Range | Choice] = {}
    for key, kind in kinds.items():
        if isinstance(kind, SmoothWeights):
            smooth = kind
            flat |= {name: Range(range=kind.range) for name in _weight_names(kind, tuple(loaded.experts))}
        else:
            _check_path(file, written, key)
            flat[key] = kind
    layers = int(plan.config.get("num_hidden_layers") or 0)
    if smooth is not None and not layers:
        raise file.document.error(("search", WEIGHTS), ": the model's config.json does not say num_hidden_layers")
    return Space(
        written, loaded.source, flat, smooth, tuple(loaded.experts), layers, plan.config.get("model_type") in BY_SEQUENCE
    )


def _check_path(file: SearchFile, recipe: Mapping[str, Any], key: str) -> None:
    try:
        put(deepcopy(dict(recipe)), key, None)
    except (KeyError, IndexError, TypeError):
        raise file.document.error(
            ("search", key),
            f": {file.settings.recipe if isinstance(file.settings.recipe, str) else 'the recipe'} has no "
            f"{key.rpartition('.')[0]!r}: write it there first",
        ) from None


def _steps(path: str) -> list[str | int]:
    return [int(index) if index else name for name, index in _STEP.findall(path)]


def get(recipe: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path such as `merge.overrides[0].scale`, None where there is none."""
    value: Any = recipe
    for step in _steps(path):
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def put(recipe: dict[str, Any], path: str, value: Any) -> None:
    """Set the value at a dotted path; sections of one level are made where they are missing, lists are not."""
    *above, last = _steps(path)
    place: Any = recipe
    for step in above:
        if place is recipe and step not in recipe:
            recipe[str(step)] = {}
        below = place[step]
        if above[0] == "experts" and step != "experts" and isinstance(below, str):
            below = place[step] = {"model": below}  # a path alone; now it also has a weight
        place = below
    fits = isinstance(place, dict) if isinstance(last, str) else isinstance(place, list)
    if not fits:
        raise TypeError(path)
    place[last] = value


def _within(kind: Range, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and kind.range[0] <= value <= kind.range[1]


def _weight_names(smooth: SmoothWeights, experts: Sequence[str]) -> Iterator[str]:
    roles = smooth.roles if "role" in smooth.by else ("all",)
    for expert in experts if "expert" in smooth.by else ("all",):
        for role in roles:
            yield from (f"{WEIGHTS}.{expert}.{role}.{point}" for point in range(smooth.points))


def _add_weights(recipe: dict[str, Any], smooth: SmoothWeights, experts: Sequence[str], layers: int, point: Point) -> None:
    """Append overrides that weigh each layer's roles; the recipe's own overrides come first and so decide before them."""
    overrides = recipe.setdefault("merge", {}).setdefault("overrides", [])
    for layer in range(layers):
        for role in smooth.roles:
            weights = {expert: _at(smooth, point, expert, role, layer / max(1, layers - 1)) for expert in experts}
            overrides.append({"match": f"layers.{layer}.{role}", "weights": weights})


def _at(smooth: SmoothWeights, point: Point, expert: str, role: str, depth: float) -> float:
    """The weight at a depth from 0 to 1."""
    owner = expert if "expert" in smooth.by else "all"
    name = f"{WEIGHTS}.{owner}.{role if 'role' in smooth.by else 'all'}"
    place = depth * (smooth.points - 1)
    below = min(int(place), max(0, smooth.points - 2))
    values = [float(point[f"{name}.{index}"]) for index in (below, min(below + 1, smooth.points - 1))]
    return round(values[0] + (values[1] - values[0]) * (place - below), 6)


def with_paths(value: Any, folder: Path, to: Path | None, key: str = "") -> Any:
    """A recipe whose relative paths start from `folder`, with absolute ones, or such that start from `to`.

    A text below a key that names a place counts as a path where a file or folder is there.
    """
    if isinstance(value, Mapping):
        return {name: with_paths(item, folder, to, str(name) if name in _PATHS else key) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_paths(item, folder, to, key) for item in value]
    if isinstance(value, Path):
        value = str(value)
    if not (isinstance(value, str) and key):
        return value
    bare, separator, expert = value.partition("#")
    place = folder / Path(bare).expanduser()
    if not place.exists() or (to is not None and not Path(bare).is_absolute() and to == folder):
        return value
    absolute = place.absolute()
    return f"{absolute if to is None else os.path.relpath(absolute, to)}{separator}{expert}"


def check_values(space: Space, document_error: Any) -> None:
    """InputError where a parameter's values are of another type than the recipe's own value."""
    for name, kind in space.kinds.items():
        own = get(space.recipe, name)
        values = kind.range if isinstance(kind, Range) else kind.choice
        if own is not None and not isinstance(own, bool | int | float) and isinstance(kind, Range):
            raise document_error(("search", name), f" is {own!r} in the recipe: give a choice instead of a range")
        if isinstance(own, int | float) and not any(isinstance(value, int | float) for value in values):
            raise document_error(("search", name), f" is the number {own!r} in the recipe, and no choice is one")
    if not space.kinds:
        raise InputError("search has no parameter: name one, such as merge.scale: {range: [0.1, 1.0]}")
