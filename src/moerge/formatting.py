"""Names, sizes and amounts as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


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
