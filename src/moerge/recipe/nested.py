"""Models of a recipe that are recipes themselves, in it or in files of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.recipe.document import Document, Key, read_document
from moerge.recipe.mergekit import is_mergekit
from moerge.recipe.schema import Recipe

_SUFFIXES = (".yaml", ".yml")


Trail = tuple[Path, ...]
"""The files of the recipes that one lies in, outermost first."""
Read = Callable[[Document, Path, Trail], Recipe]


def take_recipes(document: Document, folder: Path, trail: Trail, read: Read) -> tuple[dict[str, Any], dict[str, Recipe]]:
    """The document's `base` and `experts` with text in place of recipes, and these by name."""
    recipes: dict[str, Recipe] = {}

    def plain(path: Key, name: str, value: Any) -> Any:
        found = _recipe_at(document, path, value, folder, trail, read)
        if found is None:
            return value
        recipes[name], label = found
        return label

    sections: dict[str, Any] = {key: document.data[key] for key in ("base", "experts") if key in document.data}
    if "base" in sections:
        base = sections["base"]
        if isinstance(base, dict) and set(base) == {"model", "adapter"}:
            sections["base_adapter"], base = base["adapter"], base["model"]
        sections["base"] = plain(("base",), "base", base)
    if isinstance(sections.get("experts"), dict):
        experts = {}
        for name, value in sections["experts"].items():
            path: Key = ("experts", str(name))
            if isinstance(value, dict) and "model" in value:
                experts[name] = {**value, "model": plain((*path, "model"), str(name), value["model"])}
            elif isinstance(value, dict) and "weight" in value:
                inner = {key: item for key, item in value.items() if key != "weight"}
                experts[name] = {"model": plain(path, str(name), inner), "weight": value["weight"]} if is_recipe(inner) else value
            else:
                experts[name] = plain(path, str(name), value)
        sections["experts"] = experts
    return sections, recipes


def is_recipe(value: Any) -> bool:
    """Return whether a mapping is meant as a recipe."""
    return isinstance(value, dict) and ("experts" in value or is_mergekit(value))


def is_recipe_file(location: str, folder: Path) -> bool:
    """Return whether text names a recipe's file."""
    return location.endswith(_SUFFIXES) and not (folder / Path(location).expanduser()).is_dir()


def _recipe_at(document: Document, path: Key, value: Any, folder: Path, trail: Trail, read: Read) -> tuple[Recipe, str] | None:
    if is_recipe(value):
        lines = {key[len(path) :]: line for key, line in document.lines.items() if key[: len(path)] == path and key != path}
        inner = Document({str(key): item for key, item in value.items()}, f"{document.source}: {_dotted(path)}", lines)
        recipe = read(inner, folder, trail)
        return recipe, f"a recipe of {', '.join(recipe.experts)}"
    if isinstance(value, str) and is_recipe_file(value, folder):
        return read_file_recipe(folder / Path(value).expanduser(), trail, read), value
    return None


def read_file_recipe(file: Path, trail: Trail, read: Read) -> Recipe:
    """The recipe in a file, by way of `trail`. Raises InputError where it contains itself."""
    known = [earlier.resolve() for earlier in trail]
    if file.resolve() in known:
        around = " -> ".join(map(str, (*trail[known.index(file.resolve()) :], file)))
        raise InputError(f"a recipe cannot be one of its own models ({around}): name another one there")
    return read(read_document(file), file.parent, (*trail, file))


def _dotted(path: Key) -> str:
    return ".".join(map(str, path))
