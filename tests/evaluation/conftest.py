"""Where the real benchmarks lie, and tiny models to measure."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

import moerge
from tests.helpers.tiny import VOCABULARY, make_models, write_json, write_recipe, write_tokenizer


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
    """A folder with dense models, `native` (a Mixtral), and `routed`, which routes sequences to its experts by perplexity.

    `spaced` is `math` with a tokenizer that drops the space in front of a text's first word, as SentencePiece's do.
    """
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, dtype="F32", config={"torch_dtype": "float32"})
    for name, moe in {
        "native": {"router": {"std": 2.0}},
        "routed": {"format": "moerge", "separate": ["ffn", "attention"]},
    }.items():
        moerge.merge(write_recipe(folder, f"{name}.yaml", moe=moe), folder / name, threads=1)
    shutil.copytree(folder / "math", folder / "spaced")
    write_tokenizer(folder / "spaced", ["<unk>", "<s>", "</s>", *(f"▁w{index}" for index in range(3, VOCABULARY))])
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    tokenizer = json.loads((folder / "spaced/tokenizer.json").read_text())
    write_json(folder / "spaced/tokenizer.json", {**tokenizer, "pre_tokenizer": metaspace, "decoder": metaspace})
    return folder
