"""What makes a checkpoint another one, and whether it routes sequences."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moerge.errors import InputError
from moerge.evaluation.identity import identity, routes_sequences


def test_changes_with_weights_configuration_and_tokenizer(checkpoints: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(checkpoints / "math", folder)
    first = identity(str(folder))
    (folder / "notes.md").write_text("figures")
    assert identity(str(folder)) == first != identity(str(checkpoints / "base"))
    for file in ("config.json", "tokenizer.json"):
        before, content = identity(str(folder)), (folder / file).read_text()
        (folder / file).write_text(content + " ")
        assert identity(str(folder)) != before
    before = identity(str(folder))
    os.utime(folder / "model.safetensors", (1, 1))
    assert identity(str(folder)) != before


def test_our_own_checkpoints_may_move(checkpoints: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoints / "native", tmp_path / "copy", copy_function=shutil.copy)
    assert identity(str(tmp_path / "copy")) == identity(str(checkpoints / "native"))


def test_routes_sequences(checkpoints: Path) -> None:
    pytest.importorskip("transformers", reason="needs moerge[models]")
    assert [routes_sequences(str(checkpoints / name)) for name in ("math", "native", "routed")] == [False, False, True]
    with pytest.raises(InputError, match=r"^cannot read the configuration of nobody/nothing: "):
        routes_sequences("nobody/nothing")
    with pytest.raises(InputError, match=r"^there is no checkpoint folder \./nothing: check the path$"):
        routes_sequences("./nothing")
