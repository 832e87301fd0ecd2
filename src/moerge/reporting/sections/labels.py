"""How models and amounts are called on the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def short_names(locations: Sequence[str]) -> dict[str, str]:
    """The last part of each location where that tells them apart, else the whole of it."""
    ends = {location: location.rstrip("/").rpartition("/")[2] or location for location in locations}
    seen = Counter(ends.values())
    return {location: end if seen[end] == 1 else location for location, end in ends.items()}


def size(nbytes: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def plural(number: int, one: str, many: str = "") -> str:
    """A number and its noun."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def listed(items: Sequence[str]) -> str:
    """Items with commas, and an "and" before the last."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)
