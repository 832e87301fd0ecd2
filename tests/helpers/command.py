"""The command line as tests call it: in this process (fast) or in one of its own (signals, imports)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from moerge.checkpoint.staging import staging_folder


@dataclass(frozen=True)
class Result:
    """What a command returned and printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


def moerge(*arguments: object) -> Result:
    """Run `moerge ARGUMENTS` in this process."""
    from moerge.cli import main

    out, err = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            mock.patch.object(sys, "argv", ["moerge", *map(str, arguments)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as exit_:
        return Result(int(exit_.code or 0), out.getvalue(), err.getvalue())
    finally:
        signal.signal(signal.SIGTERM, handler)


def start(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start `moerge ARGUMENTS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "moerge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def refuses(recipe: Path, out: Path, *parts: str, options: tuple[object, ...] = (), code: int = 2) -> str:
    """Assert that `merge` fails with `code` and one line that holds all `parts`, and leaves nothing; the line."""
    result = moerge("merge", recipe, out, *options)
    assert (result.code, result.out) == (code, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("moerge: "), result.err
    for part in parts:
        assert part in lines[0], f"{part!r} is not in: {lines[0]}"
    assert not out.exists()
    assert not staging_folder(out).exists()
    return lines[0]
