"""Sources that change while they are read: noticed, whoever reads them, and nothing is published."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moerge as library
from moerge.checkpoint.reader import open_folder
from moerge.checkpoint.staging import Staging, staging_folder
from moerge.comparison.flow import compare
from moerge.errors import SourceChangedError
from moerge.extraction import extract
from moerge.files import FileState, SourceFile
from moerge.merging.pipeline import merge
from tests.helpers.command import moerge
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import llama_config, llama_tensors, make_models, write_checkpoint, write_recipe

pytestmark = pytest.mark.slow

TIES = {"merge": {"method": "ties", "scope": "model"}}


def overwrite(path: Path) -> None:
    """Other bytes in the same file, as `dd conv=notrunc` writes them."""
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\1" * 64)


def replace(path: Path) -> None:
    """Another file under the same name, of the same size, which even claims to be as old."""
    beside, about = path.with_name("new"), path.stat()
    beside.write_bytes(path.read_bytes()[:-64] + b"\1" * 64)
    os.utime(beside, ns=(about.st_atime_ns, about.st_mtime_ns))
    os.replace(beside, path)


def cut(path: Path) -> None:
    """Fewer bytes."""
    os.truncate(path, path.stat().st_size - 64)


CHANGES = pytest.mark.parametrize("change", [overwrite, replace, cut])


def once(action: Callable[[], None]) -> Callable[[object], None]:
    """A callback that does something at its first call."""
    calls: list[object] = []

    def call(argument: object) -> None:
        calls.append(argument)
        if len(calls) == 1:
            action()

    return call


@CHANGES
@pytest.mark.parametrize("sections", [{}, TIES, {"moe": {"router": {"seed": 1}}}], ids=["average", "ties", "moe"])
def test_a_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], sections: Any) -> None:
    source, out = make_models(tmp_path)["code"] / "model.safetensors", tmp_path / "out"
    act, write = once(lambda: change(source)), Staging.write
    monkeypatch.setattr(Staging, "write", lambda self, *rest: (write(self, *rest), act(0))[0])
    result = moerge("merge", write_recipe(tmp_path, **sections), out)
    assert (result.code, result.out) == (1, ""), result
    assert result.err.splitlines()[-1].startswith(f"moerge: {source} was ")
    assert not out.exists() and not staging_folder(out).exists()
    monkeypatch.undo()
    assert moerge("merge", write_recipe(tmp_path, **sections), out).code == (2 if change is cut else 0)


def test_the_last_moment_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When everything is read, and no tensor is opened again."""
    source, out = make_models(tmp_path)["code"] / "model.safetensors", tmp_path / "out"
    recipe = write_recipe(tmp_path)
    merge(recipe, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr("moerge.merging.pipeline.fit_outputs", lambda *rest: (replace(source), ())[1])
    with pytest.raises(SourceChangedError, match=r"code/model\.safetensors"):
        merge(write_recipe(tmp_path, "other.yaml", **TIES), out, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_plan_that_is_out_of_date(tmp_path: Path) -> None:
    source = make_models(tmp_path)["math"]
    planned = library.plan(write_recipe(tmp_path))
    write_checkpoint(source, llama_tensors(llama_config(), expert=9))
    with pytest.raises(SourceChangedError, match=r"math/model\.safetensors"):
        merge(planned, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_removed_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_models(tmp_path)["math"] / "model.safetensors"
    monkeypatch.setattr("moerge.merging.pipeline.fit_outputs", lambda *rest: (source.unlink(), ())[1])
    with pytest.raises(SourceChangedError, match="removed"):
        merge(write_recipe(tmp_path), tmp_path / "out")


@CHANGES
def test_an_adapter_and_its_settings(tmp_path: Path, change: Callable[[Path], None]) -> None:
    make_models(tmp_path)
    extract(str(tmp_path / "math"), tmp_path / "lora", base=str(tmp_path / "base"), rank=2)
    recipe = write_recipe(tmp_path, experts={"math": "lora", "code": "code"})
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        planned = library.plan(recipe)
        content = (tmp_path / "lora" / name).read_bytes()
        change(tmp_path / "lora" / name)
        with pytest.raises(SourceChangedError, match=name):
            merge(planned, tmp_path / "out")
        (tmp_path / "lora" / name).write_bytes(content)


@CHANGES
def test_other_commands(tmp_path: Path, change: Callable[[Path], None]) -> None:
    models = make_models(tmp_path)
    with pytest.raises(SourceChangedError, match=r"math/model\.safetensors"):
        extract(
            str(models["math"]),
            tmp_path / "lora",
            base=str(models["base"]),
            rank=2,
            progress=Recorded(once(lambda: change(models["math"] / "model.safetensors"))),
        )
    assert not any("lora" in path.name for path in tmp_path.iterdir())
    progress = Recorded(once(lambda: change(models["code"] / "model.safetensors")))
    with pytest.raises(SourceChangedError, match=r"code/model\.safetensors"):
        compare(write_recipe(tmp_path, experts=("code", "knowledge")), progress=progress)


def test_what_is_no_change(tmp_path: Path) -> None:
    """Reading, permissions, further links, and a file system that numbers its files anew."""
    file = open_folder(make_models(tmp_path)["base"]).files[0]
    file.path.read_bytes()
    file.path.chmod(0o600)
    os.link(file.path, tmp_path / "link")
    file.check_here()
    assert file.state is not None
    SourceFile(file.path, file.state._replace(inode=1, changed_ns=FileState.of(file.path).changed_ns)).check_here()
    with pytest.raises(SourceChangedError):
        SourceFile(file.path, file.state._replace(inode=1, changed_ns=1)).check_here()
