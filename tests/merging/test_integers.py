"""Integer tensors are one model's; a warning tells where that is a choice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.helpers.command import moerge
from tests.helpers.tiny import EXPERTS, llama_config, llama_tensors, read_tensors, write_checkpoint, write_recipe

WARNING = "tensor 'positions' holds whole numbers, which are not merged: it is that of base, and math, knowledge have other ones"


def write_models(folder: Path) -> None:
    for index, name in enumerate(("base", *EXPERTS)):
        own = np.arange(5, dtype=np.int64) + (7 if name in ("math", "knowledge") else 0)
        tensors = {**llama_tensors(llama_config(), expert=index), "positions": own, "mask": np.ones(3, bool)}
        write_checkpoint(folder / name, tensors)


def test_a_warning_names_the_tensor_and_who_differs(tmp_path: Path) -> None:
    write_models(tmp_path)
    result = moerge("merge", write_recipe(tmp_path), tmp_path / "out")
    assert result.code == 0
    assert [line for line in result.err.splitlines() if "whole numbers" in line] == [f"warning: {WARNING}"]
    assert read_tensors(tmp_path / "out")["positions"].tolist() == [0, 1, 2, 3, 4]
    assert WARNING in json.loads((tmp_path / "out" / "moerge.json").read_text())["warnings"]
    assert WARNING in (tmp_path / "out" / "README.md").read_text()


def test_whose_config_is_chosen_decides(tmp_path: Path) -> None:
    write_models(tmp_path)
    result = moerge("merge", write_recipe(tmp_path, config="math"), tmp_path / "out")
    assert "it is that of math, and base, code have other ones" in result.err
    result = moerge("merge", write_recipe(tmp_path, experts=["code"]), tmp_path / "same")
    assert "whole numbers" not in result.err
    result = moerge("merge", write_recipe(tmp_path, experts=["code", "math"]), tmp_path / "one")
    assert "it is that of base, and math has another one" in result.err
