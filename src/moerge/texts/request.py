"""The calibration text that a recipe names, for those who read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class TextRequest:
    """Calibration text by expert, as a recipe names it.

    `source` is how messages call the recipe, `folder` where relative paths start, `experts` the experts of the result in
    order, and `has_base` says whether the recipe names a base. `statistics` are the files in which mixtures that experts come
    from may have what their routers were computed from.
    """

    source: str
    folder: Path
    calibration: Mapping[str, str]
    experts: tuple[str, ...]
    has_base: bool
    statistics: Mapping[str, Path] = field(default_factory=dict)
