"""Names, sizes and amounts as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any


def as_size(nbytes: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def as_count(number: int) -> str:
    """A number of parameters or tokens."""
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def as_time(seconds: float) -> str:
    """Seconds, minutes or hours."""
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def short_names(locations: Sequence[str]) -> dict[str, str]:
    """The last part of each location where that tells them apart, else the whole of it."""
    ends = {location: location.rstrip("/").rpartition("/")[2] or location for location in locations}
    seen = Counter(ends.values())
    return {location: end if seen[end] == 1 else location for location, end in ends.items()}


def plural(number: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(items: Sequence[str]) -> str:
    """Items with commas, and an "and" before the last."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


class Displayed:
    """A result that notebooks show as one line in text and as a table in HTML; both come from `to_json`.

    A dataclass needs `repr=False` to keep the line.
    """

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        raise NotImplementedError

    def headline(self) -> str:
        """Return the line without the class's name."""
        return ", ".join(f"{key} {value}" for key, value in list(self.figures().items())[:4])

    def figures(self) -> Mapping[str, Any]:
        """Return the rows of the table: names and values."""
        counted = {
            key: f"{len(value)} entries" if isinstance(value, list | dict) else value for key, value in self.to_json().items()
        }
        return {key: value for key, value in counted.items() if value is not None}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline()}>"

    def _repr_html_(self) -> str:
        rows = (f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>" for key, value in self.figures().items())
        return f"<table><caption>{escape(repr(self))}</caption>{''.join(rows)}</table>"
