"""Files that are whole whenever they carry their name."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moerge.errors import MachineError
from moerge.files import atomic_path, atomic_write, scratch_folder


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    atomic_write(path, b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as beside:
        beside.write_bytes(b"ha")
        raise KeyboardInterrupt
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.csv", b"old")]


def test_the_name_is_taken_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with atomic_path(path) as beside:
        beside.write_bytes(b"new")
        assert not path.exists()
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.csv", b"new")]


def test_a_folder_is_made_but_not_of_a_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a.csv", b"1")
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["a.csv"]
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"^cannot write .*/file/a\.csv: "):
        atomic_write(tmp_path / "file" / "a.csv", b"1")


def test_what_a_killed_process_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = "import os, tempfile; from moerge.files import scratch_folder; "
    killed += f"tempfile.tempdir = {str(tmp_path)!r}; c = scratch_folder('moerge-x-'); c.__enter__(); os._exit(9)"
    subprocess.run([sys.executable, "-c", killed], check=False)
    (left,) = tmp_path.iterdir()
    with scratch_folder("moerge-x-") as other:
        assert left.exists() and other.exists()  # it may just be beginning
        for folder in (left, other):
            os.utime(folder / ".in-use", (0, 0))
        with scratch_folder("moerge-x-"):
            assert not left.exists() and other.exists()
    assert list(tmp_path.iterdir()) == []
