"""Tiny models with text to gather statistics over."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moerge.statistics import Statistics, open_statistics
from moerge.statistics.facts import Kind
from moerge.statistics.files import stored_name
from tests.helpers import tiny

NAMES = ("base", *tiny.EXPERTS)


def documents(name: str, *, count: int = 9) -> list[str]:
    """Texts of 4 to 8 words, drawn from the whole vocabulary."""
    rng = np.random.default_rng(NAMES.index(name))
    return [" ".join(f"w{word}" for word in rng.integers(3, tiny.VOCABULARY, 4 + number % 5)) for number in range(count)]


def write_texts(folder: Path, names: Sequence[str] = NAMES, **options: Any) -> dict[str, str]:
    """NAME.txt for each, and what the recipe's `calibration` says about them."""
    for name in names:
        (folder / f"{name}.txt").write_text("\n\n".join(documents(name, **options)))
    return {name: f"{name}.txt" for name in names}


def recipe(folder: Path, method: str = "fisher", name: str = "recipe.yaml", **sections: Any) -> Path:
    """A recipe beside the models of `make_models(folder)` and their texts."""
    calibration = write_texts(folder)
    merge = {"method": method, "statistics": "stats"} if method in ("fisher", "regmean") else {"method": method}
    return tiny.write_recipe(folder, name, **{"merge": merge, "calibration": calibration, **sections})


def read(statistics: Statistics, kind: Kind, tensor: str) -> np.ndarray:
    """A sum as a whole array; Gram matrices as their upper triangle."""
    name = statistics.facts.grams[tensor].stored if kind == "gram" else stored_name(kind, tensor)
    stored = statistics.stored[name]
    return stored.open().read(0, np.empty(stored.size, np.float32)).reshape(stored.shape)


def gram(statistics: Statistics, tensor: str) -> np.ndarray:
    """A layer's whole Gram matrix, float64."""
    triangle_N = read(statistics, "gram", tensor)
    size = int((np.sqrt(8 * len(triangle_N) + 1) - 1) / 2)
    matrix_II = np.zeros((size, size))
    matrix_II[np.triu_indices(size)] = triangle_N
    return matrix_II + np.triu(matrix_II, 1).T


def of(folder: Path, expert: str = "math") -> Statistics:
    """An expert's statistics in a folder."""
    return open_statistics(folder / f"{expert}.safetensors")
