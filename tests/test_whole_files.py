"""Files that are whole whenever they carry their name."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerge.errors import MachineError
from moerge.files import whole_file, write_whole


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_whole(path, b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as beside:
        beside.write_bytes(b"ha")
        raise KeyboardInterrupt
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.csv", b"old")]


def test_the_name_is_taken_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with whole_file(path) as beside:
        beside.write_bytes(b"new")
        assert not path.exists()
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a.csv", b"new")]


def test_a_folder_is_made_but_not_of_a_file(tmp_path: Path) -> None:
    write_whole(tmp_path / "new" / "a.csv", b"1")
    assert [found.name for found in (tmp_path / "new").iterdir()] == ["a.csv"]
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match=r"^cannot write .*/file/a\.csv: "):
        write_whole(tmp_path / "file" / "a.csv", b"1")
