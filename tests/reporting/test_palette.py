"""The page's colours, measured: on their ground, under text, and as colour-blind people see them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from moerge.reporting import palette

SIMULATIONS = {
    "normal": np.eye(3),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
    "tritanopia": np.array([[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]),
}
"""Linear RGB to linear RGB (Machado, Oliveira, Fernandes 2009, severity 1)."""
SETS = {"light": (palette.LIGHT, palette.LIGHT_GROUND), "dark": (palette.DARK, palette.DARK_GROUND)}


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) / 255
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    """Ottosson 2020."""
    to_cones = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]])
    to_cones = np.vstack([to_cones, [0.0883024619, 0.2817188376, 0.6299787005]])
    to_lab = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]])
    to_lab = np.vstack([to_lab, [0.0259040371, 0.7827717662, -0.8086757660]])
    return np.asarray(to_lab @ np.cbrt(to_cones @ np.clip(rgb, 0, 1)))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("eyes", SIMULATIONS)
def test_any_two_colours_differ(name: str, eyes: str) -> None:
    seen = [oklab(SIMULATIONS[eyes] @ linear(colour)) for colour in SETS[name][0]]
    distances = {
        (i, j): 100 * float(np.linalg.norm(one - other)) for (i, one), (j, other) in combinations(list(enumerate(seen)), 2)
    }
    assert min(distance for (_, j), distance in distances.items() if j < 5) > 8  # a base and four experts
    assert min(distances.values()) > 6


@pytest.mark.parametrize("name", SETS)
def test_colours_stand_out_and_text_on_them_can_be_read(name: str) -> None:
    colours, ground = SETS[name]
    for colour in colours:
        assert palette.contrast(colour, ground) >= 3  # WCAG 2.1, 1.4.11
        assert palette.contrast(colour, palette.ink(colour)) >= 4.5  # 1.4.3


def test_contrast() -> None:
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_names_keep_their_colours() -> None:
    names = ["math", "base", "code", "math", *"abcdef"]
    assert palette.numbered(names) == {"math": 1, "base": 0, "code": 2, "a": 3, "b": 4, "c": 5, "d": 6, "e": 0, "f": 0}
