"""What figures say and how they are written; not their pixels."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from moerge import figures
from moerge.comparison.advice import assess
from moerge.comparison.charts import charts
from moerge.comparison.similarity import Expert, Pair, Region, Similarity

pytest.importorskip("matplotlib")

PARTS = [*(f"attention.{part}" for part in "qkvo"), *(f"ffn.{part}" for part in ("gate", "up", "down")), "norm.ffn"]


def similarity(layers: int, experts: tuple[str, ...], *, anchored: bool = True) -> Similarity:
    """Made-up figures: cosines 0.01 * layer, of norms 0.9."""
    regions = [Region("part", layer, part) for layer in range(layers) for part in PARTS]
    regions += [Region("layer", layer, role) for layer in range(layers) for role in ("attention", "ffn", "norm")]
    regions += [Region("part", None, "embedding"), Region("model", None, "all")]
    regions += [Region("role", None, role) for role in ("embedding", "attention", "ffn", "norm")]
    pairs, rows = [], []
    for region in regions:
        cosine = 0.9 if "norm" in region.role else 0.01 * (region.layer or 0)
        for a, b in itertools.combinations(experts, 2):
            measured = (cosine, 0.4, 0.5 - cosine / 2, 0.4, 1.0, 0.2, 0.98)
            pairs.append(Pair(**region._asdict(), a=a, b=b, parameters=1000, **named(Pair, "cosine", measured)))
        for name in experts:
            measured = (0.15, 0.98, 0.9, 0.4, 0.1, 0.2, 0.7) if anchored else ()
            about = {**region._asdict(), "expert": name, "parameters": 1000, "norm": 1.0}
            rows.append(Expert(**about, **named(Expert, "relative_norm", measured)))
    return Similarity(experts, anchored, (0.8,) if anchored else (), tuple(pairs), tuple(rows))


def named(kind: type[Pair | Expert], first: str, values: tuple[float, ...]) -> dict[str, Any]:
    """Values by the fields of a row, from `first` on."""
    fields = list(kind.model_fields)
    return dict(zip(fields[fields.index(first) :], values, strict=False))


def texts(svg: bytes) -> list[str]:
    """All text of a figure, which stays text."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg.decode())


def drawn(found: Similarity, name: str) -> list[str]:
    chart = charts(found)[name]
    return texts(figures.encoded(chart.draw(), "svg", chart.title, chart.description))


def test_small_heatmaps_have_their_numbers() -> None:
    found = drawn(similarity(2, ("math", "code", "chat")), "cosine")
    assert found.count("0.010") == 7 and found.count("0.90") == 2  # layer 1; its norm and layer 0's
    assert {"attention.q", "ffn.down", "norm.ffn", "layer", "cosine similarity"} <= set(found)
    assert "mean over 3 pairs of experts, 0.001 million parameters each" in found
    assert "outside: embedding 0.000" in found


def test_large_heatmaps_have_none_and_name_every_second_layer() -> None:
    found = drawn(similarity(32, ("math", "code", "knowledge", "chat")), "cosine")
    assert "0.010" not in found
    assert [text for text in found if text.isdigit()] == [str(layer) for layer in range(0, 32, 2)]


def test_norms_do_not_set_the_scale() -> None:
    """They are so alike that all else would look the same: the colour bar ends in a point instead."""
    ticks = [text for text in drawn(similarity(32, ("a", "b")), "cosine") if re.fullmatch(r"−?\d\.\d", text)]
    assert max(float(tick) for tick in ticks if "−" not in tick) == 0.4


def test_every_pair_has_a_panel_and_every_role_a_line() -> None:
    found = drawn(similarity(4, ("math", "code", "knowledge", "chat")), "pairs")
    pairs = itertools.combinations(("math", "code", "knowledge", "chat"), 2)
    assert {f"{a} and {b}" for a, b in pairs} <= set(found)
    assert [text for text in found if text in ("attention", "ffn", "norm")] == ["attention", "ffn", "norm"]
    assert {"layer", "cosine similarity"} <= set(found)


def test_what_there_is_to_draw() -> None:
    assert list(charts(similarity(2, ("a", "b")))) == ["cosine", "conflict", "pairs", "drift", "ties"]
    assert list(charts(similarity(2, ("a", "b"), anchored=False))) == ["cosine", "conflict", "pairs"]
    assert list(charts(similarity(0, ("a", "b")))) == ["ties"]


@pytest.mark.parametrize("name", ["cosine", "conflict", "pairs", "drift", "ties"])
def test_the_same_figures_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    found, written = similarity(3, ("math", "code")), []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        chart = charts(found)[name]
        paths = figures.save(chart.draw(), folder, name, chart.title, chart.description)
        assert [path.name for path in paths] == [f"{name}.svg", f"{name}.png"]
        written.append([path.read_bytes() for path in paths])
    assert written[0] == written[1]
    svg, png = written[0]
    assert f"<title>{charts(found)[name].title}</title>" in svg.decode()
    assert (
        "Experts: math, code. Mean cosine over all layers: embedding 0.000, attention 0.000, ffn 0.000, norm 0.90."
        in svg.decode()
    )
    assert png.startswith(b"\x89PNG") and b"Software" not in png


def test_colours_are_told_apart_without_colour() -> None:
    """Series beyond the palette get hatches; no two of sixteen look the same."""
    assert len({(figures.color(index), figures.hatch(index)) for index in range(64)}) == 64
    assert figures.hatch(7) == "" != figures.hatch(8)


@pytest.mark.parametrize(
    ("values", "ends"),
    [([0.1, None], (-0.1, 0.1)), ([0.11, -0.02], (-0.15, 0.15)), ([], (-0.05, 0.05)), ([-0.97], (-1, 1)), ([1.0], (-1, 1))],
)
def test_scales_end_at_round_numbers(values: list[float | None], ends: tuple[float, float]) -> None:
    assert figures.around(0, values, least=0.05, most=1) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "0.50"), (0.0994, "0.099"), (0.0996, "0.10"), (-0.0001, "0.000"), (-0.5, "-0.50"), (1.414, "1.41")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert figures.short(value) == text


def test_csv_has_one_column_a_key() -> None:
    assert figures.as_csv([{"a": 1, "b": None}, {"a": 0.5, "b": "x,y"}]) == 'a,b\n1,\n0.5,"x,y"\n'


def test_a_role_that_one_expert_has_alone_can_be_merged() -> None:
    found = similarity(1, ("a", "b"))
    alone = Expert(scope="role", layer=None, role="head", expert="a", parameters=10, norm=1.0)
    (head,) = [v for v in assess(Similarity(("a", "b"), True, (), found.pairs, (*found.rows, alone))) if v.role == "head"]
    assert (head.answer, head.reason, head.cosine) == ("merge", "only one expert has it", None)
