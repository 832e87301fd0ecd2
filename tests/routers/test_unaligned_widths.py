"""Computed routers of experts whose feed-forward width torch's grouped product does not take, in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from tests.helpers import tiny

_WIDTH, _PADDED = 20, 24
_WIDENED = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}


def _padded(name: str, values: np.ndarray) -> np.ndarray:
    """The tensor of a model that computes the same and is wider: what is added is zero."""
    axis = next((axis for module, axis in _WIDENED.items() if module in name), None)
    if axis is None:
        return values
    return np.pad(values, [(0, (_PADDED - _WIDTH) * (axis == dimension)) for dimension in range(2)])


def _gates(folder: Path, width: int, router: dict[str, Any]) -> dict[str, np.ndarray]:
    models = tiny.make_models(folder / "narrow", experts=("a", "b"), config={"intermediate_size": _WIDTH}, dtype="BF16")
    config = tiny.llama_config(intermediate_size=width)
    for name, narrow in models.items():
        tensors = tiny.read_values(narrow)
        wide = {key: _padded(key, values) for key, values in tensors.items()} if width == _PADDED else tensors
        tiny.write_checkpoint(folder / name, wide, config, dtype="BF16")
    for name in ("base", "a", "b"):
        texts = [" ".join(f"w{(number * 7 + len(name)) % 60 + 3}" for number in range(start, start + 20)) for start in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": f"{name} {text}"}) for text in texts))
    calibration = {name: f"{name}.jsonl" for name in ("base", "a", "b")} if router["kind"] == "ridge" else {}
    recipe = tiny.write_recipe(folder, experts=("a", "b"), moe={"top_k": 2, "router": router}, calibration=calibration)
    plan = moerge.plan(recipe)
    assert any("experts_implementation" in text for text in plan.warnings) == (width == _WIDTH)
    moerge.merge(plan, folder / "out", threads=1)
    return {name: values for name, values in tiny.read_values(folder / "out").items() if name.endswith(".gate.weight")}


@pytest.mark.parametrize("kind", ["ridge", "projection"])
def test_gates_are_those_of_a_wider_model_that_computes_the_same(tmp_path: Path, kind: str) -> None:
    found, wanted = (_gates(tmp_path / str(width), width, {"kind": kind}) for width in (_WIDTH, _PADDED))
    assert len(found) == 2
    for name, gate in found.items():
        np.testing.assert_allclose(gate, wanted[name], atol=0.05 * np.abs(wanted[name]).max(), err_msg=name)
