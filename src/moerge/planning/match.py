"""Patterns of overrides: which tensors they mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from moerge.errors import InputError, suggest
from moerge.methods.method import MergeMethod
from moerge.recipe.schema import Recipe

_RANGE = re.compile(r"(\d+)-(\d+)")


def matches(pattern: str, role: str, name: str) -> bool:
    """Whether `pattern` means the tensor of this role path and name.

    A pattern is a tensor name with `*`, or the beginning of a role path, `layers.N.` optional: `attention`, `ffn.down`,
    `layers.0-3.attention`, `layers.7`, `embedding`. `*` stands for one part and `0-3` for the layers 0 to 3.
    """
    if fnmatchcase(name, pattern):
        return True
    wanted, parts = pattern.split("."), role.split(".")
    if wanted[0] != "layers" and parts[0] == "layers":
        parts = parts[2:]
    return len(wanted) <= len(parts) and all(_part_matches(w, p) for w, p in zip(wanted, parts, strict=False))


def _part_matches(wanted: str, part: str) -> bool:
    span = _RANGE.fullmatch(wanted)
    if span and part.isdigit():
        return int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)


class MethodChooser:
    """Picks the method of each tensor: the first override that matches, else the recipe's own."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._unused = {override.match: None for override in recipe.overrides}
        self._roles: dict[str, None] = {}

    def choose(self, role: str, name: str) -> MergeMethod:
        """The method for one tensor."""
        self._roles[_general(role) or name] = None
        for override in self._recipe.overrides:
            if matches(override.match, role, name):
                self._unused.pop(override.match, None)
                return override.method
        return self._recipe.method

    def check_all_used(self) -> None:
        """InputError if an override matched no tensor that is merged: most likely a slip."""
        for pattern in self._unused:
            known: Sequence[str] = list(self._roles)
            raise InputError(
                f"{self._recipe.source}: merge.overrides: {pattern!r} matches no tensor that is merged, {suggest(pattern, known)}"
            )


def _general(role: str) -> str:
    return re.sub(r"^layers\.\d+\.", "", role)
