"""Values of mergekit's parameters: numbers, lists that are interpolated over layers, and lists with filters.

As in mergekit's documentation and its `config.py` (0.1.5): of a list with filters the first entry whose `filter` is part of the
tensor's name decides; a list of numbers is interpolated over the layers of a slice, evenly spaced; what lies in no layer takes
the first. Where nothing applies, the next wider scope does: a model's own `parameters`, its slice's, the file's, the default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from moerge.errors import suggest
from moerge.recipe.document import Document, Key, short

Kind = Literal["number", "truth"]
Value = float | bool
Settings = Mapping[str, "Setting"]


@dataclass(frozen=True)
class Setting:
    """Entries (filter or None, values); several values are a gradient."""

    entries: tuple[tuple[str | None, tuple[Value, ...]], ...]

    def at(self, name: str, depth: float) -> Value | None:
        """The value for the tensor `name` at this depth of its slice, None if no entry applies."""
        for wanted, values in self.entries:
            if wanted in (None, "*") or str(wanted) in name:
                return _interpolated(values, depth)
        return None


def resolve(parameter: str, scopes: Iterable[Settings], name: str, depth: float) -> Value | None:
    """A parameter's value in the narrowest scope that has one."""
    for settings in scopes:
        if parameter in settings and (value := settings[parameter].at(name, depth)) is not None:
            return value
    return None


def _interpolated(values: tuple[Value, ...], depth: float) -> Value | None:
    if not values:
        return None
    position = depth * (len(values) - 1)
    below = int(position)
    if isinstance(values[0], bool):
        return values[below]
    share = position - below
    return (1 - share) * values[below] + share * values[min(below + 1, len(values) - 1)]


def read_setting(document: Document, path: Key, written: Any, kind: Kind) -> Setting:
    """A Setting from what stands at `path`; InputError for what mergekit could not read either."""
    if isinstance(written, dict):
        return Setting((_condition(document, path, written, kind),))
    if isinstance(written, list) and any(isinstance(item, dict) for item in written):
        entries = []
        for index, item in enumerate(written):
            if not isinstance(item, dict):
                raise document.error((*path, index), " should have a 'value' like its neighbours: numbers and filters do not mix")
            entries.append(_condition(document, (*path, index), item, kind))
        return Setting(tuple(entries))
    return Setting(((None, _values(document, path, written, kind)),))


def _condition(document: Document, path: Key, written: dict[Any, Any], kind: Kind) -> tuple[str | None, tuple[Value, ...]]:
    for key in written:
        if key not in ("filter", "value"):
            raise document.error(
                (*path, str(key)), f": unknown key, {suggest(str(key), ('filter', 'value'))}", code="unknown-name"
            )
    wanted = written.get("filter")
    if wanted is not None and not isinstance(wanted, str):
        raise document.error((*path, "filter"), f" should be a part of tensor names, not {short(wanted)}")
    if "value" not in written:
        raise document.error(path, " needs a 'value'")
    return wanted, _values(document, (*path, "value"), written["value"], kind)


def _values(document: Document, path: Key, written: Any, kind: Kind) -> tuple[Value, ...]:
    if isinstance(written, list):
        return tuple(_value(document, (*path, index), item, kind) for index, item in enumerate(written))
    return (_value(document, path, written, kind),)


def _value(document: Document, path: Key, written: Any, kind: Kind) -> Value:
    if kind == "truth":
        if isinstance(written, bool) or written in (0, 1):
            return bool(written)
        raise document.error(path, f" should be true or false, not {short(written)}")
    try:
        if isinstance(written, (bool, int, float, str)) and math.isfinite(float(written)):  # YAML reads 1e-3 as text
            return float(written)
    except (ValueError, OverflowError):
        pass
    raise document.error(path, f" should be a number, not {short(written)}")
