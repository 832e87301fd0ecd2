"""Where the real benchmarks lie, and tiny models to measure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import moerge
from tiny import make_models, write_recipe


@pytest.fixture(scope="session")
def bench() -> Path:
    """The real benchmarks' files; they are not part of the project."""
    default = Path(__file__).parents[3] / "shared" / "data" / "bench"
    folder = Path(os.environ.get("MOERGE_BENCH", default))
    if not folder.is_dir():
        pytest.skip("the benchmarks' files are not on this machine (set MOERGE_BENCH)")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base` and `math`, and `routed`, which routes sequences to its experts by perplexity."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, dtype="F32", config={"torch_dtype": "float32"})
    recipe = write_recipe(folder, moe={"format": "moerge", "separate": ["ffn", "attention"]})
    moerge.merge(recipe, folder / "routed", threads=1)
    return folder
