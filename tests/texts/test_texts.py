"""Calibration text: what a document is in each format, and what is said about files that hold none."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.texts import document_hash, overlap, read_documents, read_texts


def write(path: Path, content: str | list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(content, str):
        content = "".join(json.dumps(entry) + "\n" for entry in content)
    path.write_text(content, encoding="utf-8")
    return path


def test_txt_that_is_named_itself_is_split_at_empty_lines(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "\n\none\nstill one\n \n\ntwo\n\n  three: indented\nlast")
    assert list(read_documents("a.txt", relative_to=tmp_path)) == ["one\nstill one", "two", "  three: indented\nlast"]


def test_txt_in_a_folder_or_glob_is_one_document_each_in_the_order_of_names(tmp_path: Path) -> None:
    write(tmp_path / "texts/b.txt", "b\n\nstill b")
    write(tmp_path / "texts/a/z.txt", "a")
    write(tmp_path / "texts/c.jsonl", [{"text": "c1"}, {"text": "c2"}])
    write(tmp_path / "texts/.hidden/d.txt", "d")
    write(tmp_path / "texts/LICENSE", "not text to calibrate on")
    assert list(read_documents("texts", relative_to=tmp_path)) == ["a", "b\n\nstill b", "c1", "c2"]
    assert list(read_documents("texts/*.txt", relative_to=tmp_path)) == ["b\n\nstill b"]
    assert list(read_documents(str(tmp_path / "texts/**/*.txt"))) == ["a", "b\n\nstill b"]


def test_jsonl_takes_the_text_field_and_skips_what_is_blank(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "one", "id": 1}\n\n{"text": " "}\n{"text": "zw\\u00f6lf"}\n')
    assert list(read_documents(str(file))) == ["one", "zwölf"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in {"a.txt": "one\n\ntwo", "b/a.txt": "one", "c.jsonl": '{"text": "one"}\n'}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    found = [list(read_documents(name, relative_to=tmp_path)) for name in ("a.txt", "b", "c.jsonl")]
    assert found == [["one", "two"], ["one"], ["one"]]


def test_a_character_written_as_two_halves_is_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n')
    assert list(read_documents(str(file))) == ["\U0001f600"]


def test_the_text_may_be_in_another_field(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"body": "one", "text": 3}])
    assert list(read_documents(str(file), field="body")) == ["one"]
    with pytest.raises(InputError) as caught:
        list(read_documents(str(file), field="content"))
    assert str(caught.value) == (
        f'{file}, line 1: should be an object with a "content", such as {{"content": "..."}}, '
        "or say with 'field' where its text is"
    )


def test_only_as_much_is_read_as_is_wanted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"text": "one"}\n{"text": "two"}\nnot JSON\n')
    assert read_texts("math", "a.jsonl", relative_to=tmp_path, limit=2).documents == ("one", "two")
    with pytest.raises(InputError, match=r"^calibration\.math: .*a\.jsonl, line 3: not valid JSON"):
        read_texts("math", "a.jsonl", relative_to=tmp_path, limit=3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.md", "text", "cannot tell the format of .*a.md: its name should end in .txt, .jsonl or .parquet"),
        ("a.jsonl", '"text"\n', r'a.jsonl, line 1: should be an object with a "text"'),
        ("a.jsonl", '{"txt": "a"}\n', r'a.jsonl, line 1: should be an object with a "text"'),
        ("a.jsonl", '{"text": 3}\n', r'a.jsonl, line 1: should be an object with a "text"'),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b \\ud83d c"}\n',
            r"a.jsonl, line 2: the text has \\ud83d, half of a character: write it whole, or remove it$",
        ),
        ("a.txt", " \n\n", "a.txt holds no text"),
    ],
)
def test_bad_files_are_named(name: str, content: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / name, content)
    with pytest.raises(InputError, match=r"^calibration\.code: .*" + message):
        read_texts("code", name, relative_to=tmp_path, limit=5)


def test_bad_places_are_named(tmp_path: Path) -> None:
    write(tmp_path / "folder/a.md", "text")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    for location, message in {
        "nowhere.txt": "there is no file or folder",
        "folder": r"folder holds no file that ends in \.txt, \.jsonl or \.parquet",
        "*.jsonl": "no file matches",
        "folder/*": "cannot tell the format of .*a.md",
        "latin.txt": "latin.txt is not UTF-8 text",
    }.items():
        with pytest.raises(InputError, match=r"^calibration\.math: .*" + message):
            read_texts("math", location, relative_to=tmp_path, limit=1)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", "PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="needs pyarrow: pip install pyarrow, or convert it to jsonl"):
        read_texts("math", "a.parquet", relative_to=tmp_path, limit=1)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "b.parquet")
    write(tmp_path / "c.parquet", "not parquet")
    assert list(read_documents("a.parquet", relative_to=tmp_path)) == ["one", "two"]
    with pytest.raises(InputError, match=r"b\.parquet has no column 'text', only body: rename the one that holds the text$"):
        list(read_documents("b.parquet", relative_to=tmp_path))
    assert list(read_documents("b.parquet", relative_to=tmp_path, field="body")) == ["one"]
    with pytest.raises(InputError, match=r"b\.parquet has no column 'title', only body: say with 'field' which holds the text$"):
        list(read_documents("b.parquet", relative_to=tmp_path, field="title"))
    with pytest.raises(InputError, match=r"cannot read .*c\.parquet as parquet"):
        list(read_documents("c.parquet", relative_to=tmp_path))


def test_hash_ignores_layout_and_case_and_nothing_else() -> None:
    assert document_hash("A  text,\n in lines\n") == document_hash("a text, in lines")
    assert document_hash("a text in lines") != document_hash("a text, in lines")
    assert document_hash("a text, in lines") == "19d9943e910769c7"


def test_overlap_counts_documents_of_any_expert() -> None:
    manifest = {"calibration": {"a": {"documents": [document_hash("one")]}, "b": {"documents": [document_hash("two")]}}}
    assert overlap(["One ", "three", "TWO", "two"], manifest) == 3
    assert overlap(["one"], {}) == 0


def test_digest_tells_order_and_layout_apart(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    write(tmp_path / "b.jsonl", [{"text": "two"}, {"text": "one"}])
    write(tmp_path / "c.jsonl", [{"text": "one"}, {"text": "two "}])
    first, *others = (read_texts("math", f"{name}.jsonl", relative_to=tmp_path, limit=9) for name in "abc")
    assert len(first.hashes) == 2
    assert all(other.digest != first.digest for other in others)
    assert others[1].hashes == first.hashes


@pytest.mark.parametrize(
    ("location", "message"),
    [("x" * 5000, "^there is no text 'x+ ... x+': File name too long$"), ("~nobody-at-all/x.txt", "home directory")],
)
def test_locations_that_no_system_knows(location: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        list(read_documents(location, relative_to=tmp_path))
