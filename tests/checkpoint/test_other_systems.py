"""Merging, resuming and replacing where this machine's Unix functions are not there, or do less."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moerge import system
from moerge.checkpoint.staging import staging_folder
from moerge.merging.pipeline import merge
from moerge.system import RandomAccess
from tests.helpers.tiny import make_models, write_recipe

SECTIONS = {"merge": {"method": "ties", "scope": "model"}}
SHARD = 6000
SCRIPT = """
import os
from pathlib import Path
from moerge import system
from moerge.merging.pipeline import merge
folder, limit = Path({folder!r}), {limit}
assert system.fcntl is None and not hasattr(os, "preadv")
recipe = folder / "recipe.yaml"
merge(recipe, folder / "plain", max_shard_bytes=limit, threads=2)
merge(folder / "old.yaml", folder / "replaced", max_shard_bytes=limit)
merge(recipe, folder / "replaced", max_shard_bytes=limit, force=True)

class Crash(BaseException): pass
count, write = 0, system.RandomAccess._write_some
def crashing(self, view, offset):
    global count
    count += 1
    if count > 12:
        raise Crash
    return write(self, view, offset)
system.RandomAccess._write_some = crashing
try:
    merge(recipe, folder / "resumed", max_shard_bytes=limit, threads=1)
except Crash:
    pass
else:
    raise SystemExit("it did not crash")
system.RandomAccess._write_some = write
assert not (folder / "resumed").exists()
merge(recipe, folder / "resumed", max_shard_bytes=limit, resume=True)
assert merge(recipe, folder / "resumed", max_shard_bytes=limit, resume=True).was_complete
"""
EXTRACT = """
from moerge.extraction import extract
from moerge.inspection import verify
extract({expert!r}, {out!r}, base={base!r}, rank=2)
assert not verify({checkpoint!r}).problems
"""
REFUSED = """
from moerge.errors import MachineError
from moerge.evaluation.sandbox import run_program
from moerge.system import free_memory
assert free_memory() > 1 << 20
try:
    run_program("x = 1")
except MachineError as error:
    assert "evaluate code on Linux" in str(error)
else:
    raise SystemExit("it ran")
"""


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def elsewhere(script: str) -> None:
    """Run a script in a process that looks like one on Windows."""
    helper = Path(__file__).parents[1] / "helpers" / "other_systems.py"
    done = subprocess.run([sys.executable, str(helper), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_whole_merge_on_another_system(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    recipe = write_recipe(tmp_path, **SECTIONS)
    write_recipe(tmp_path, "old.yaml")
    merge(recipe, tmp_path / "expected", max_shard_bytes=SHARD)
    out, paths = tmp_path / "lora", {"expert": str(models["math"]), "base": str(models["base"])}
    elsewhere(
        SCRIPT.format(folder=str(tmp_path), limit=SHARD)
        + EXTRACT.format(out=str(out), checkpoint=str(tmp_path / "plain"), **paths)
        + REFUSED
    )
    expected = snapshot(tmp_path / "expected")
    for name in ("plain", "replaced", "resumed"):
        assert snapshot(tmp_path / name) == expected, name
    assert (out / "adapter_model.safetensors").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def failing(number: int, real: Callable[..., Any] | None = None, only: Callable[..., bool] = lambda *rest: True) -> Any:
    """A function that the file system does not have."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        if only(*arguments):
            raise OSError(number, os.strerror(number))
        assert real is not None
        return real(*arguments, **keywords)

    return call


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What was warned of, each kind once."""
    monkeypatch.setattr(system, "_warned", set())
    return lambda: [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: Any) -> None:
    make_models(tmp_path)
    monkeypatch.setattr(system.fcntl, "flock", failing(number))
    merge(write_recipe(tmp_path), tmp_path / "out")
    assert len(said()) == 1 and f"the file system of {staging_folder(tmp_path / 'out')} has no locks" in said()[0]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.ENOSYS, errno.EBADF])
def test_a_file_system_whose_folders_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: Any
) -> None:
    make_models(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(number, os.fsync, lambda descriptor: os.path.isdir(f"/proc/self/fd/{descriptor}")))
    merge(write_recipe(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "moerge.json").exists()
    assert len(said()) == 1 and all("has no durable names" in text for text in said())


def test_a_failing_disk_is_no_such_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        system.make_durable(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    with pytest.raises(OSError, match="Invalid argument"):  # a file's content has to reach the disk
        system.make_durable(tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSPC])
def test_space_that_cannot_be_taken_in_advance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    file = RandomAccess(tmp_path / "file", write=True)
    if number == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            file.allocate(1000)
        return
    file.allocate(1000)
    assert file.size == 1000


@pytest.mark.parametrize("portable", [False, True])
def test_places_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, portable: bool) -> None:
    if portable:
        for name in ("preadv", "pwrite", "posix_fallocate"):
            monkeypatch.delattr(os, name)
    file = RandomAccess(tmp_path / "file", write=True)
    file.allocate(300_000)
    content = bytes(range(256)) * 1000
    file.write(content, 7)
    found = bytearray(len(content) + 100)
    assert file.read_into(memoryview(found)[: len(content)], 7) == len(content)
    assert found[: len(content)] == content
    assert file.read_into(memoryview(found), 299_990) == 10
    assert file.read_into(memoryview(found), 300_000) == 0
    file.close()
    file.close()


class FakeLocking:
    """msvcrt's locks, by the file that is locked: closing it lets go of them, which `closed` stands for."""

    LK_NBLCK = 2
    held: set[tuple[int, int]] = set()

    def locking(self, descriptor: int, mode: int, count: int) -> None:
        about = os.fstat(descriptor)
        key = about.st_dev, about.st_ino
        assert (mode, count) == (self.LK_NBLCK, 1) and os.lseek(descriptor, 0, os.SEEK_CUR) > 10**12
        if key in self.held:
            raise PermissionError(errno.EACCES, "Permission denied")
        self.held.add(key)


def test_locks_of_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locking = FakeLocking()
    monkeypatch.setattr(system, "fcntl", None)
    monkeypatch.setattr(system, "msvcrt", locking)
    with open(tmp_path / "file", "a+b", buffering=0) as first, open(tmp_path / "file", "rb", buffering=0) as second:
        assert system.lock(first) and first.write(b"x") == 1
        assert not system.lock(second, shared=True)
        locking.held.clear()
        assert system.lock(second)
        assert second.read() == b"x"


def test_macs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync does not reach the disk there, and folders are swapped by another function."""
    asked: list[int] = []
    monkeypatch.setattr(system.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(system.fcntl, "fcntl", lambda descriptor, command: asked.append(command))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    system.make_durable(tmp_path)
    assert asked == [51]

    class Library:
        def __init__(self, name: None, use_errno: bool) -> None: ...

        def renamex_np(self, one: bytes, other: bytes, flags: int) -> int:
            assert flags == 2
            shutil.move(os.fsdecode(one), tmp_path / "aside")
            shutil.move(os.fsdecode(other), os.fsdecode(one))
            shutil.move(tmp_path / "aside", os.fsdecode(other))
            return 0

    monkeypatch.setattr("ctypes.CDLL", Library)
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "mark").touch()
    assert system.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "other" / "mark").exists()
