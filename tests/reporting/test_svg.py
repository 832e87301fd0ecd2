"""Charts: scales hold their values, bars their shares."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from moerge.reporting.svg import Bar, Dot, Line, Scale, dots, lines, stacked_bars, stacked_columns

numbers = st.floats(-1e9, 1e9)


@given(st.lists(numbers, min_size=1), st.booleans())
def test_a_scale_holds_its_values_between_round_ticks(values: list[float], whole: bool) -> None:
    scale = Scale.over(values, whole=whole)
    places = [scale.at(value) for value in values]
    assert all(scale.first - 1e-6 <= place <= 98 + 1e-6 for place in places)
    assert list(scale.ticks) == sorted(set(scale.ticks))
    assert len(scale.ticks) <= 8
    if not whole:
        assert len(scale.ticks) >= 2
        assert (scale.at(scale.ticks[0]), scale.at(scale.ticks[-1])) == pytest.approx((2, 98))


def test_ticks() -> None:
    scale = Scale.over([0.03, 0.13])
    assert [scale.text(tick) for tick in scale.ticks] == ["0.00", "0.05", "0.10", "0.15"]
    assert [Scale.over([-20.0, 1000.0]).text(tick) for tick in (0.0, -0.0, 1500.0)] == ["0", "0", "1,500"]
    assert Scale.over([3.0]).ticks == (2.5, 3.0, 3.5)
    assert Scale.over([0.0, 31.0], whole=True).ticks == (0, 10, 20, 30)
    assert Scale.over([0.0, 1.0], whole=True).ticks == (0, 1)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9).filter(lambda shares: sum(shares) > 0.01))
def test_bars_fill_their_width(given_shares: list[float]) -> None:
    shares = [share / sum(given_shares) for share in given_shares]
    drawing = stacked_bars([Bar("label", "", list(enumerate(shares)))])
    boxes = [(float(x), float(width)) for x, width in re.findall(r'x="([\d.]+)%" y="\d+" width="([\d.]+)%"', drawing.body)]
    assert len(boxes) == sum(share > 0 for share in shares)
    assert sum(width for _, width in boxes) == pytest.approx(100, abs=0.01)
    for (x, width), (following, _) in pairwise(boxes):
        assert x + width == pytest.approx(following, abs=0.01)


def test_text_is_escaped() -> None:
    for drawing in (
        stacked_bars([Bar("<a>", "<b>", [(0, 1.0)])]),
        dots([Dot("<a>", "<b>", 0, 1.0, 0.5, 1.5)], "<c>", reference=(1.0, "<d>")),
        lines([Line("<a>", 0, [(0, 1.0), (1, 2.0)])], "<b>", "<c>"),
        stacked_columns([[(0, 1.0)]], "<a>"),
    ):
        assert isinstance(drawing.body, Markup)
        assert "&lt;" in drawing.body and not re.search(r"<[abcd]>", drawing.body)


def test_a_line_of_one_point_and_of_none() -> None:
    assert lines([Line("one", 1, [(3.0, 2.0)])], "x", "y").body.count("<circle") == 1
    assert "nan" not in lines([], "x", "y").body


def test_layers_from_the_bottom() -> None:
    drawing = stacked_columns([[(0, 0.25), (1, 0.75)], [(0, 1.0), (1, 0.0)]], "layer", height=100)
    boxes = re.findall(r'class="f(\d)" x="([\d.]+)%" y="([\d.]+)" width="([\d.]+)%" height="([\d.]+)"', drawing.body)
    assert boxes == [("0", "2", "75", "46", "25"), ("1", "2", "0", "46", "75"), ("0", "52", "0", "46", "100")]
    assert not math.isnan(drawing.height)
