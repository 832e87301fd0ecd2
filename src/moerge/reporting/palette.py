"""The page's colours: a light and a dark set, told apart by colour-blind eyes and standing out from the page's ground.

`tests/reporting/test_palette.py` measures both. The files that commands write for print have one ground and the colours of Okabe
and Ito (`moerge.figures`); on two grounds those are too pale on the one or too dark on the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

LIGHT_GROUND, DARK_GROUND = "#ffffff", "#14171c"
LIGHT = ("#6b7280", "#2a71e2", "#ed6d4a", "#036a34", "#941a7d", "#907000", "#5321a3")
DARK = ("#9aa3b2", "#3f79f0", "#fd702a", "#20d87c", "#cb3978", "#f4e306", "#d8a8f8")
"""The first is for the base and for what is left over, the others for experts and models in turn."""
INKS = ("#ffffff", "#10131a")
COLOURS = len(LIGHT)
OTHERS = 0


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb as WCAG 2 defines it."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours, from 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def ink(ground: str) -> str:
    """The text colour that is easier to read on a ground."""
    return max(INKS, key=lambda colour: contrast(colour, ground))


def variables(colours: Iterable[str]) -> str:
    """CSS custom properties --c0, --c1, ... and --i0, --i1, ... for text on them."""
    return "".join(f"--c{index}:{colour};--i{index}:{ink(colour)};" for index, colour in enumerate(colours))


def numbered(names: Iterable[str]) -> Mapping[str, int]:
    """A colour number for each name, the same on the whole page: 0 for the base, then in turn; beyond the palette, 0 again."""
    found: dict[str, int] = {}
    for name in names:
        used = sum(number > 0 for number in found.values())
        found.setdefault(name, OTHERS if name == "base" or used >= COLOURS - 1 else used + 1)
    return found
