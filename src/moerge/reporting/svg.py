"""Charts as SVG that fits any width: horizontal positions are percentages, so bars stretch and letters do not.

A drawing is the inside of an `<svg width="100%" height="...">`; colours are CSS classes, so light and dark are the page's
business. Everything that is not markup is escaped by markupsafe. The same data give the same text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

_TEXT, _BAR, _THIN = 17, 20, 5
_ACROSS = 44
"""Letters that fit beside each other on a phone; longer labels lose their middle, and tables have them whole."""
_MOST_POINTS = 40
"""Longer lines have no dot at each point."""
_LABELLED = 0.09
"""A segment of at least this share has room for its number on a phone."""


@dataclass(frozen=True)
class Drawing:
    """The inside of an SVG element, and its height in pixels."""

    body: Markup
    height: int


@dataclass(frozen=True)
class Bar:
    """A stacked bar: what stands above it to the left and right, shares by colour, and those of a thin bar below."""

    label: str
    note: str
    shares: Sequence[tuple[int, float]]
    thin: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Dot:
    """A value on an axis, with the ends of its error bar, and what stands above it to the left and right."""

    label: str
    note: str
    colour: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """Points from left to right; `dash` is the number of the line's pattern."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    dash: int = 0


def stacked_bars(bars: Sequence[Bar]) -> Drawing:
    """Bars below each other, each with its label on a line of its own."""
    parts, y = [], 0
    for bar in bars:
        words, height = _above(bar.label, bar.note, y)
        y += height
        parts += [words, _stack(bar.shares, y, _BAR, labelled=True)]
        y += _BAR
        if bar.thin:
            parts.append(_stack(bar.thin, y + 2, _THIN, labelled=False))
            y += _THIN + 2
        y += 12
    return Drawing(Markup("").join(parts), max(1, y - 8))


def _above(label: str, note: str, y: int) -> tuple[Markup, int]:
    """A label to the left and a note to the right of it, or below where a phone has no room for both; and their height."""
    if len(label) > _ACROSS:
        label = f"{label[: _ACROSS // 2]}…{label[-(_ACROSS // 2) :]}"
    below = _TEXT if len(label) + len(note) > _ACROSS else 0
    words = Markup('<text class="halo" x="0" y="{}">{}</text>').format(y + 12, label)
    if note:
        beside = '<text class="note halo" x="100%" y="{}" text-anchor="end">{}</text>'
        words += Markup(beside).format(y + 12 + below, note)
    return words, _TEXT + below


def _stack(shares: Sequence[tuple[int, float]], y: int, height: int, *, labelled: bool) -> Markup:
    parts, left = [], 0.0
    for colour, share in shares:
        width = 100 * share
        if share > 0:
            box = '<rect class="f{}" x="{}%" y="{}" width="{}%" height="{}"/>'
            parts.append(Markup(box).format(colour, _short(left), y, _short(width), height))
        if labelled and share >= _LABELLED:
            text = '<text class="t{}" x="{}%" y="{}" text-anchor="middle">{}%</text>'
            parts.append(Markup(text).format(colour, _short(left + width / 2), y + height - 6, f"{width:.0f}"))
        left += width
    return Markup("").join(parts)


def stacked_columns(columns: Sequence[Sequence[tuple[int, float]]], axis: str, height: int = 120) -> Drawing:
    """A column for each layer, numbered from 0, from 0 to 100%."""
    step, parts = 100 / max(1, len(columns)), []
    for index, shares in enumerate(columns):
        low = float(height)
        for colour, share in shares:
            if share > 0:
                low -= height * share
                box = '<rect class="f{}" x="{}%" y="{}" width="{}%" height="{}"/>'
                x = _short(index * step + 0.04 * step)
                parts.append(Markup(box).format(colour, x, _short(low), _short(0.92 * step), _short(height * share)))
    every = max(1, -(-len(columns) // 8))
    for index in range(0, len(columns), every):
        tick = '<text class="note" x="{}%" y="{}" text-anchor="middle">{}</text>'
        parts.append(Markup(tick).format(_short((index + 0.5) * step), height + 14, index))
    parts.append(Markup('<text class="note" x="50%" y="{}" text-anchor="middle">{}</text>').format(height + 29, axis))
    return Drawing(Markup("").join(parts), height + 34)


def dots(points: Sequence[Dot], axis: str, *, reference: tuple[float, str] | None = None) -> Drawing:
    """Values with error bars on one horizontal axis, with a line at a value to compare with."""
    ends = [end for dot in points for end in (dot.low, dot.high)] + ([reference[0]] if reference else [])
    scale = Scale.over(ends)
    parts, y = [], 14 if reference else 0
    if reference:
        parts.append(_beside(scale.at(reference[0]), 10, reference[1]))
    for dot in points:
        words, height = _above(dot.label, dot.note, y)
        y += height
        parts += [words, *_dot(dot, scale, y + 6, reference)]
        y += 17
    bottom = y
    parts[:0] = [_vertical(scale.at(tick), 0, bottom, "grid") for tick in scale.ticks]
    parts += [_tick(scale, tick, bottom + 13) for tick in scale.ticks]
    parts.append(Markup('<text class="note" x="50%" y="{}" text-anchor="middle">{}</text>').format(bottom + 29, axis))
    return Drawing(Markup("").join(parts), bottom + 34)


def _dot(dot: Dot, scale: Scale, y: int, reference: tuple[float, str] | None) -> Iterable[Markup]:
    yield Markup('<line class="grid" x1="0" x2="100%" y1="{}" y2="{}"/>').format(y, y)
    if reference:  # beside the dots only, since it would cross the letters above them
        yield _vertical(scale.at(reference[0]), y - 8, y + 8, "mark")
    error = '<line class="s{}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>'
    yield Markup(error).format(dot.colour, _short(scale.at(dot.low)), _short(scale.at(dot.high)), y, y)
    yield Markup('<circle class="f{}" cx="{}%" cy="{}" r="5"/>').format(dot.colour, _short(scale.at(dot.value)), y)


def lines(
    series: Sequence[Line], x_axis: str, y_axis: str, *, within: Sequence[float] | None = None, height: int = 190
) -> Drawing:
    """Lines over one horizontal axis of whole numbers. The vertical axis' name stands on top; `within` are values that it holds,
    by default those of the lines.
    """
    across = Scale.over([x for line in series for x, _ in line.points], whole=True, first=9.0)
    up = Scale.over([y for line in series for _, y in line.points] if within is None else within)
    top, bottom = 36, height

    def level(value: float) -> float:
        return bottom - (bottom - top) * (value - up.low) / (up.high - up.low)

    parts = [Markup('<text class="note" x="0" y="11">{}</text>').format(y_axis)]
    for tick in up.ticks:
        ruled = '<line class="grid" x1="0" x2="100%" y1="{}" y2="{}"/>'
        parts.append(Markup(ruled).format(_short(level(tick)), _short(level(tick))))
    for line in series:
        parts += _path(line, across, level, height)
    for tick in up.ticks:
        text = '<text class="note halo" x="0" y="{}">{}</text>'
        parts.append(Markup(text).format(_short(level(tick) - 3), up.text(tick)))
    parts += [_tick(across, tick, bottom + 16) for tick in across.ticks]
    parts.append(Markup('<text class="note" x="50%" y="{}" text-anchor="middle">{}</text>').format(bottom + 32, x_axis))
    return Drawing(Markup("").join(parts), bottom + 37)


def _path(line: Line, across: Scale, level: Callable[[float], float], height: int) -> Iterable[Markup]:
    places = [(_short(across.at(x)), _short(level(y))) for x, y in line.points]
    points = " ".join(",".join(place) for place in places)
    stretched = '<svg viewBox="0 0 100 {}" preserveAspectRatio="none" width="100%" height="{}">'
    drawn = '<polyline class="s{} d{}" points="{}"/></svg>'
    yield Markup(stretched).format(height, height) + Markup(drawn).format(line.colour, line.dash % 4, points)
    for x, y in places if len(places) <= _MOST_POINTS else ():
        yield Markup('<circle class="f{}" cx="{}%" cy="{}" r="3"/>').format(line.colour, x, y)


def _vertical(at: float, top: int, bottom: int, name: str) -> Markup:
    return Markup('<line class="{}" x1="{}%" x2="{}%" y1="{}" y2="{}"/>').format(name, _short(at), _short(at), top, bottom)


def _beside(at: float, y: int, text: str) -> Markup:
    anchor, dx = ("end", -4) if at > 50 else ("start", 4)
    return Markup('<text class="note halo" x="{}%" dx="{}" y="{}" text-anchor="{}">{}</text>').format(
        _short(at), dx, y, anchor, text
    )


def _tick(scale: Scale, tick: float, y: int) -> Markup:
    at = scale.at(tick)
    anchor = "start" if at < 6 else "end" if at > 94 else "middle"
    text = '<text class="note" x="{}%" y="{}" text-anchor="{}">{}</text>'
    return Markup(text).format(_short(at), y, anchor, scale.text(tick))


@dataclass(frozen=True)
class Scale:
    """From values to percentages of the width, with ticks at round values."""

    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int
    first: float = 2.0

    LAST: ClassVar[float] = 98.0

    @classmethod
    def over(cls, values: Sequence[float], *, whole: bool = False, first: float = 2.0) -> Scale:
        """A scale that holds all values from `first` percent on: its ends are ticks, or with `whole` the outermost values."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if high - low < 1e-9 * max(1.0, abs(low), abs(high)):
            low, high = low - 0.5, high + 0.5
        raw = (high - low) / 4
        power = math.floor(math.log10(raw))
        step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= raw * (1 - 1e-9))
        if whole:
            step = max(1.0, step)
        ticks = tuple(tick * step for tick in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1))
        if whole:  # steps and layers do not go on beyond the last
            return cls(low, high, tuple(tick for tick in ticks if low <= tick <= high), 0, first)
        return cls(ticks[0], ticks[-1], ticks, max(0, -math.floor(math.log10(step) + 1e-9)), first)

    def at(self, value: float) -> float:
        """The place of a value, in percent."""
        return self.first + (self.LAST - self.first) * (value - self.low) / (self.high - self.low)

    def text(self, value: float) -> str:
        """A tick's label."""
        return f"{value + 0.0:,.{self.digits}f}"


def _short(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
