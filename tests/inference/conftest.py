"""MoEs of the tiny models, that the tests here run."""

from __future__ import annotations

from pathlib import Path

import pytest

import moerge
from tests.helpers.tiny import make_models, write_recipe


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, the experts, `native` (a Mixtral with decided gates) and `routed` (by sequence)."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, dtype="F32", config={"torch_dtype": "float32"})
    for name, moe in {
        "native": {"router": {"std": 2.0, "seed": 1}},
        "routed": {"format": "moerge", "separate": ["ffn", "attention"]},
    }.items():
        moerge.merge(write_recipe(folder, f"{name}.yaml", moe=moe), folder / name, threads=1)
    return folder
