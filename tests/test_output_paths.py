"""Outputs that are written with a `~`."""

from __future__ import annotations

from pathlib import Path

import pytest

from moerge.files import target_of


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert target_of("~/out") == tmp_path / "out"
    assert target_of("a~b").name == "a~b"
