"""`method: coefficients` with a file that does not fit: one sentence, and never a read beyond the coefficients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.errors import InputError
from moerge.methods.coefficients import Weighed
from moerge.methods.method import Block
from moerge.methods.task_arithmetic import TaskArithmetic
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import make_models, write_recipe

UP = "model.layers.0.mlp.up_proj.weight"
"""A tensor of 24 times 16 entries."""


def write(folder: Path, change: Callable[[dict[str, Any]], None] = lambda data: None) -> Path:
    """A recipe that merges with a file of coefficients, as `change` leaves it."""
    make_models(folder, experts=["math", "code"])
    data: dict[str, Any] = {
        "format": 1,
        "experts": ["math", "code"],
        "directions": {"method": "task_arithmetic"},
        "fixed": 0.3,
        "coefficients": {UP: [[0.1] * 5, [0.2] * 5]},
        "chunk_sizes": {UP: 77},
        "learning": {},
    }
    change(data)
    (folder / "k.json").write_text(json.dumps(data))
    return write_recipe(folder, experts=["math", "code"], merge={"method": "coefficients", "file": "k.json"})


def test_a_fitting_file_merges(tmp_path: Path) -> None:
    assert moerge("merge", write(tmp_path), tmp_path / "out", "--quiet").code == 0


def cut(count: int, size: int) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(coefficients={UP: [[0.1] * count, [0.2] * count]}, chunk_sizes={UP: size})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut(7, 5), f"tensor {UP!r} has 384 entries, which 7 chunks of 5 do not cut up: learn again with these models"),
        (cut(5, 76), f"tensor {UP!r} has 384 entries, which 5 chunks of 76 do not cut up: learn again with these models"),
        (cut(5, 78), f"tensor {UP!r} has 384 entries, which 5 chunks of 78 do not cut up: learn again with these models"),
        (cut(385, 1), f"tensor {UP!r} has 384 entries, which 385 chunks of 1 do not cut up: learn again with these models"),
        (
            lambda data: data["coefficients"].update({"no.such.tensor": [[1.0], [1.0]]}),
            "the models have no tensor 'no.such.tensor' to merge: learn again with these models",
        ),
        (
            lambda data: data["directions"].update(method="slerp"),
            "directions.method: slerp has no task vectors: learn again",
        ),
        (
            lambda data: data["directions"].update(method="tie"),
            "directions.method: unknown merge method 'tie': did you mean 'ties'?",
        ),
        (lambda data: data["directions"].update(foo=3), "directions.foo: unknown key, known: normalize, scale"),
        (
            lambda data: data.update(learning="x"),
            " is damaged, or was written by another version of moerge (learning should be a mapping): learn again",
        ),
        (
            lambda data: data.update(fixed=1e39),
            " is damaged, or was written by another version of moerge (1e+39 is not a number): learn again",
        ),
        (
            lambda data: data.update(fixed=10**400),
            " is not a number): learn again",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    refuses(write(tmp_path, change), tmp_path / "out", str(tmp_path / "k.json"), message)


def test_a_size_beyond_all_numbers_is_refused(tmp_path: Path) -> None:
    recipe, file = write(tmp_path), tmp_path / "k.json"
    file.write_text(file.read_text().replace(": 77", ": 1e999"))
    what = f"{file} is damaged, or was written by another version of moerge (cannot convert float infinity to integer)"
    refuses(recipe, tmp_path / "out", what)


@pytest.mark.parametrize(
    ("start", "experts", "message"),
    [
        (8, 2, "2 rows of coefficients for 2 chunks of 5 entries do not fit a tensor of 2 experts and at least 12 entries"),
        (0, 1, "2 rows of coefficients for 2 chunks of 5 entries do not fit a tensor of 1 experts and at least 4 entries"),
    ],
)
def test_the_method_itself_never_reads_beyond_its_coefficients(start: int, experts: int, message: str) -> None:
    method = Weighed(directions=TaskArithmetic(), c_EC=((1.0, 2.0), (3.0, 4.0)), chunk=5)
    none = np.zeros(4, np.float32)
    block = Block(np.ones((experts, 4), np.float32), np.ones(experts, np.float32), none, none.copy(), None, none, start)
    with pytest.raises(InputError, match=message):
        method.combine(block)
