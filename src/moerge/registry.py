"""Named parts that other packages can add: merge methods, families, MoE formats, routers.

Built-ins are declared in moerge's own pyproject.toml under the same entry point groups that a third party uses, and are
imported when they are asked for. A notebook registers a part without installing a package.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from moerge.errors import InputError, suggest

Part = TypeVar("Part")


class Registry(Generic[Part]):
    """The parts of one entry point group, by name.

    Args:
        group: The entry point group.
        noun: The word for such a part in errors.
    """

    def __init__(self, group: str, noun: str) -> None:
        self.group, self.noun = group, noun
        self._registered: dict[str, Part] = {}

    def names(self) -> list[str]:
        """Return all known names, sorted."""
        return sorted({*_entry_points(self.group), *self._registered})

    def register(self, name: str, part: Part) -> None:
        """Make a part known by a name in this process, in place of a part that had the name."""
        self._registered[name] = part

    def get(self, name: str) -> Part:
        """Return the part called `name`; InputError suggests the nearest known one."""
        if name in self._registered:
            return self._registered[name]
        point = _entry_points(self.group).get(name)
        if point is None:
            raise InputError(f"unknown {self.noun} {name!r}: {suggest(name, self.names())}", code="unknown-name")
        part: Part = point.load()
        return part

    def find(self, name: str) -> Part | None:
        """Return the part called `name`, or None."""
        return self.get(name) if name in self.names() else None


@cache
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
