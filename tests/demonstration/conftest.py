"""Small trained checkpoints, made once for all workers."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import FileLock

from moerge.demonstration.text import Corpus, make_corpora
from moerge.demonstration.train import train_models

SCALE = 0.08


@pytest.fixture(scope="session")
def corpora() -> dict[str, Corpus]:
    return make_corpora(0, scale=SCALE)


@pytest.fixture(scope="session")
def trained(corpora: dict[str, Corpus], tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Path]:
    root = tmp_path_factory.getbasetemp()
    folder = (root if worker_id == "master" else root.parent) / "demo-models"
    done = folder / "done"
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            train_models(corpora, folder, scale=SCALE)
            done.touch()
    return {name: folder / name for name in ("base", "math", "code", "knowledge")}
