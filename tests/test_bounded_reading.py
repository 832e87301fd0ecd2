"""Files that never end, or are far larger than such a file can be, are refused before they are read."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest

from moerge.errors import InputError, MachineError
from moerge.files import MOST_BYTES, read_file, unreadable
from moerge.texts import documents as texts
from moerge.texts import read_documents
from tests.helpers.command import moerge
from tests.helpers.tiny import make_models, write_recipe


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(300 * 10**9)


KINDS: dict[Callable[[Path], None], str] = {pipe: "pipe or a device", device: "pipe or a device", huge: "300,000,000,000 bytes"}
FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", FILES)
def test_files_of_a_checkpoint(tmp_path: Path, kind: Callable[[Path], None], file: str) -> None:
    folder = make_models(tmp_path)["base"]
    (folder / file).unlink()
    kind(folder / file)
    result = moerge("plan", write_recipe(tmp_path))
    if kind is huge and file == "model.safetensors":
        assert result.code == 2 and file in result.err
    elif kind is huge or file in ("config.json", "model.safetensors"):
        assert result.code == 2 and file in result.err and KINDS[kind] in result.err
    else:
        assert result.code in (0, 2)  # what is not a file is no tokenizer


@pytest.mark.parametrize("kind", KINDS)
def test_recipes(tmp_path: Path, kind: Callable[[Path], None]) -> None:
    kind(tmp_path / "recipe.yaml")
    result = moerge("plan", tmp_path / "recipe.yaml")
    assert result.code == 2 and KINDS[kind] in result.err


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
@pytest.mark.parametrize("where", ["itself", "folder"])
def test_texts(tmp_path: Path, name: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "MOST_CHARACTERS", 1000)
    text = "word " * 190 + "end"
    write(tmp_path / name, [text, text])
    location = str(tmp_path / name if where == "itself" else tmp_path)
    if where == "folder" and name == "a.txt":  # one document
        with pytest.raises(InputError, match=r"a\.txt.*1,000 characters"):
            list(read_documents(location))
    else:
        assert list(read_documents(location)) == [text, text]
    write(tmp_path / name, ["short", text + " of it" * 20])
    with pytest.raises(InputError, match=rf"{name}.*1,000 characters"):
        list(read_documents(location))


def write(path: Path, documents: list[str]) -> None:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": documents}), path)
    elif path.suffix == ".txt":
        path.write_text("\n\n".join(documents))
    else:
        path.write_text("\n".join(f'{{"text": "{document}"}}' for document in documents))


def test_a_sparse_text_does_not_fill_the_memory(tmp_path: Path) -> None:
    huge(tmp_path / "a.txt")
    with pytest.raises(InputError, match=r"a\.txt.*200,000,000 characters"):
        list(read_documents(str(tmp_path / "a.txt")))


def test_texts_that_cannot_be_looked_for(tmp_path: Path) -> None:
    for location in ("x" * 300, str(tmp_path / ("x" * 300) / "*.txt"), f"{'x' * 300}/**/*.txt", "\0"):
        with pytest.raises(InputError):
            list(read_documents(location))
    with (
        mock.patch.object(Path, "is_file", side_effect=PermissionError(errno.EACCES, "Permission denied")),
        pytest.raises(InputError, match="Permission denied"),
    ):
        list(read_documents(str(tmp_path)))


def test_limits_are_of_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(InputError, match="5 bytes"):
        read_file(tmp_path / "a", 4)
    assert MOST_BYTES >= 2 * 10**8


def test_whose_fault_it_is() -> None:
    for number, kind in {
        errno.ENOENT: InputError,
        errno.EACCES: InputError,
        errno.EMFILE: MachineError,
        errno.EIO: MachineError,
    }.items():
        error = unreadable(Path("x"), OSError(number, os.strerror(number)))
        assert type(error) is kind and str(error) == f"cannot read x: {os.strerror(number)}"
