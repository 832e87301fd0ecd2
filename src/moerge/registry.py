"""Named parts that other packages can add: merge methods, families, MoE formats, routers.

Built-ins are declared in moerge's own pyproject.toml under the same entry point groups that a third party uses, and are
imported when they are asked for.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from moerge.errors import InputError, suggest

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """The parts of one entry point group, by name. `noun` is how errors call such a part."""

    def __init__(self, group: str, noun: str) -> None:
        self.group, self.noun = group, noun

    def names(self) -> list[str]:
        """All known names, sorted."""
        return sorted(_entry_points(self.group))

    def get(self, name: str) -> Part:
        """The part called `name`; InputError suggests the nearest known one."""
        found = _entry_points(self.group).get(name)
        if found is None:
            raise InputError(f"unknown {self.noun} {name!r}: {suggest(name, self.names())}")
        part: Part = found.load()
        return part

    def find(self, name: str) -> Part | None:
        """The part called `name`, or None."""
        return self.get(name) if name in _entry_points(self.group) else None


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
