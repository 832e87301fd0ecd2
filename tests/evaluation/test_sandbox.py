"""Programs that try what they should not, and programs that end early."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from moerge.evaluation import sandbox
from moerge.evaluation.sandbox import run_program


@pytest.mark.parametrize(
    "program",
    [
        "x = 1",
        "",
        "print('x' * 10**6)",
        "if __name__ == '__main__':\n    import math, re, collections, itertools, heapq, datetime, statistics, decimal",
        "try:\n    input()\nexcept EOFError:\n    pass\nelse:\n    raise AssertionError",
        "import os\nassert os.listdir() == []",
    ],
)
def test_passes(program: str) -> None:
    assert run_program(program).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'unequal'", "AssertionError: unequal"),
        ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
        ("exit()", "SystemExit: None"),
        ("import os\nos._exit(0)", "ended before its last line"),
        ("def f(:", "SyntaxError: invalid syntax (<generated>, line 1)"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt: "),
        ("class E(Exception):\n    def __str__(self): raise E\nraise E", "an error that cannot be shown"),
        ("x = 'a' * 2**34", "MemoryError: "),
        ("import os\nos.fork()", "PermissionError: os.fork is refused to generated code"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError: subprocess.Popen is refused to generated code"),
        ("import os\nos.system('true')", "PermissionError: os.system is refused to generated code"),
        ("import threading\nthreading.Thread(target=print).start()", "RuntimeError: can't start new thread"),
        ("import socket\nsocket.socket()", "PermissionError: socket.__new__ is refused to generated code"),
        ("import os\nos.remove('/tmp/x')", "PermissionError: os.remove is refused to generated code"),
        ("open('/etc/hostname').read()", "PermissionError: opening /etc/hostname is refused to generated code"),
        ("open('/dev/null', 'w')", "PermissionError: opening /dev/null is refused to generated code"),
        (
            "x = '\ud800'",
            "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800' in position 5: surrogates not allowed",
        ),
    ],
)
def test_fails(program: str, reason: str) -> None:
    outcome = run_program(program)
    assert (outcome.passed, outcome.reason) == (False, reason)


def test_the_kernel_refuses_what_the_hook_does_not_see() -> None:
    forks = "import ctypes\nassert ctypes.CDLL(None).fork() == -1"
    assert run_program(forks).passed
    assert run_program("import resource\nassert resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)").passed
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))"
    assert run_program(raised).reason == "ValueError: not allowed to raise maximum limit"


def test_an_endless_loop_is_ended() -> None:
    begun = time.monotonic()
    outcome = run_program("while True:\n    pass", seconds=1)
    assert (outcome.passed, outcome.reason) == (False, "took longer than 1 s")
    assert time.monotonic() - begun < 30


def test_a_program_that_ignores_signals_is_ended() -> None:
    program = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)"
    assert run_program(program, seconds=0.5).reason == "took longer than 0.5 s"


def test_nothing_of_the_environment_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    names = {"PATH", "LANG", "HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE"}
    assert run_program(f"import os\nassert set(os.environ) <= {names}, dict(os.environ)").passed
    parent = f"open('/proc/{os.getpid()}/environ').read()"
    assert run_program(parent).reason == f"PermissionError: opening /proc/{os.getpid()}/environ is refused to generated code"


def test_its_folder_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    outcome = run_program("import os\nraise ValueError(os.path.basename(os.path.dirname(os.getcwd())))")
    assert outcome.reason == f"ValueError: {tmp_path.name}"
    assert list(tmp_path.iterdir()) == []


def test_saying_passed_is_not_passing() -> None:
    assert not run_program(
        "import os\nfor fd in range(3, 32):\n    try:\n        os.write(fd, b'passed')\n    except OSError:\n        pass"
    ).passed
