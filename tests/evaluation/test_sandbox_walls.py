"""Which wall is taken on which machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from moerge.cli.views import evaluation
from moerge.evaluation import sandbox

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """The choice is kept for a process's life."""
    sandbox.wall.cache_clear()
    yield
    sandbox.wall.cache_clear()


@pytest.mark.parametrize(
    ("installed", "working", "expected"),
    [
        ({"bwrap", "unshare"}, {"bubblewrap", "namespace"}, "bubblewrap"),
        ({"bwrap", "unshare"}, {"namespace"}, "namespace"),
        ({"unshare"}, {"bubblewrap", "namespace"}, "namespace"),
        ({"bwrap"}, set(), "limits"),
        (set(), {"bubblewrap", "namespace"}, "limits"),
    ],
)
def test_the_best_that_works(monkeypatch: pytest.MonkeyPatch, installed: set[str], working: set[str], expected: str) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda tool: tool if tool in installed else None)
    monkeypatch.setattr(sandbox, "_works", lambda name: name in working)
    assert sandbox.wall() == expected
    assert ("bubblewrap does not work here" in sandbox.describe_wall()) == (expected != "bubblewrap")


def test_a_tool_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container whose processes may make no namespaces."""
    for tool in ("bwrap", "unshare"):
        (tmp_path / tool).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / tool).chmod(0o755)
    command = sandbox._command
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(
        sandbox,
        "_command",
        lambda name, folder: [str(tmp_path / part) if part in ("bwrap", "unshare") else part for part in command(name, folder)],
    )
    assert sandbox.wall() == "limits"
    assert sandbox.run_program("x = 1").passed


@pytest.mark.parametrize("quiet", [False, True])
@pytest.mark.parametrize("name", ["bubblewrap", "namespace", "limits"])
def test_the_user_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, quiet: bool) -> None:
    monkeypatch.setattr(sandbox, "wall", lambda: name)
    evaluation.wall(quiet=quiet)
    said = capsys.readouterr().err
    assert said.startswith("warning: ") == (name != "bubblewrap")
    assert said.count("\n") == (0 if quiet and name == "bubblewrap" else 1)
    assert ("without a network" in said) == (name == "namespace" or (name == "bubblewrap" and not quiet))
