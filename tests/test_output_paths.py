"""Outputs that are written with a `~`, and sizes in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerge.files import in_words, target_of


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert target_of("~/out") == tmp_path / "out"
    assert target_of("a~b").name == "a~b"


@pytest.mark.parametrize(
    ("nbytes", "words"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (1.234e9, "1.23 GB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_sizes(nbytes: float, words: str) -> None:
    assert in_words(nbytes) == words
