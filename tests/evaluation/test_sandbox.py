"""Programs that try what they should not, and programs that end early."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from moerge.errors import MachineError
from moerge.evaluation import sandbox
from moerge.evaluation.sandbox import describe_wall, run_program

pytestmark = pytest.mark.slow

WALLS = ["bubblewrap", "namespace", "limits"]


def require(name: str) -> str:
    """The wall's name; skips where it cannot be built on this machine."""
    if name != "limits" and not sandbox._works(name):
        pytest.skip(f"{name} does not work here: {sandbox._TOOLS[name]} is not installed, or may not make namespaces")
    return name


@pytest.fixture(autouse=True, params=WALLS)
def wall(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds behind each of the walls."""
    name = require(request.param)
    monkeypatch.setattr(sandbox, "wall", lambda: name)
    return name


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
    assert run_program("import resource\nassert resource.getrlimit(resource.RLIMIT_FSIZE) == (0, 0)").passed
    raised = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (9, 9))"
    assert run_program(raised).reason == "ValueError: not allowed to raise maximum limit"


@pytest.fixture
def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the kernel is left."""
    assert "sys.addaudithook(" in sandbox._SCRIPT
    monkeypatch.setattr(sandbox, "_SCRIPT", sandbox._SCRIPT.replace("sys.addaudithook(", "id("))


@pytest.mark.usefixtures("unhooked")
def test_the_kernel_alone(wall: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    forks = "import os\ntry:\n    os.fork()\nexcept BlockingIOError:\n    pass\nelse:\n    raise SystemExit"
    assert run_program(forks).passed
    assert not run_program(f"open({str(secret)!r}, 'a').write('y')").passed
    assert secret.read_text() == "x"
    status = "import re\nfound = re.findall(r'Cap(?:Prm|Eff|Inh|Amb):\\s*(\\w+)', open('/proc/self/status').read())\n"
    if wall == "bubblewrap":
        hidden = [str(secret), "/etc/passwd", "/home", "/proc/self", "/usr/bin/env"]
        assert run_program(f"import os\nassert not any(map(os.path.exists, {hidden}))").passed
    else:
        assert run_program(f"{status}assert len(found) == 4 and not any(int(each, 16) for each in found), found").passed
        assert os.geteuid() != 0 or not run_program("open('/etc/shadow')").passed


@pytest.mark.usefixtures("unhooked")
def test_the_network(wall: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run_program(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)").passed == (wall == "limits")
    assert ("without a network" in describe_wall()) == (wall != "limits")


@pytest.mark.parametrize(
    "program",
    [
        "import ctypes",
        "import _ctypes",
        "from importlib import import_module as i\ni('ctypes.util')",
        "import sys, importlib.util as u\ns = u.find_spec('_ctypes')\ns.name = 'x._ctypes'\nu.module_from_spec(s)",
        "import _xxsubinterpreters as i\ni.create()",
        "import sqlite3",
        "import gc\ngc.get_objects()",
    ],
)
def test_ways_around_the_hook_are_refused(program: str) -> None:
    """The import, so that libraries that can do without it do; and what finds the hook in memory."""
    tried = "".join(f"    {line}\n" for line in program.splitlines())
    refused = f"try:\n{tried}except (ImportError, PermissionError):\n    pass\nelse:\n    raise SystemExit"
    assert run_program(refused).passed


def test_libraries_that_can_do_without_ctypes_are_there() -> None:
    program = "import email.mime.text, importlib.metadata, json, numpy\nassert numpy.arange(4).sum() == 6"
    assert run_program(program) == sandbox.Outcome(True, "")


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
    names = {"PATH", "LANG", "HOME", "TMPDIR", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "LC_CTYPE", "PWD"}
    assert run_program(f"import os\nassert set(os.environ) <= {names}, dict(os.environ)").passed
    parent = f"open('/proc/{os.getpid()}/environ').read()"
    assert run_program(parent).reason == f"PermissionError: opening /proc/{os.getpid()}/environ is refused to generated code"


def test_its_folder_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    outcome = run_program("import os\nraise ValueError(os.path.basename(os.path.dirname(os.getcwd())))")
    assert outcome.reason == f"ValueError: {tmp_path.name}"
    assert list(tmp_path.iterdir()) == []


FRAMES = """
import sys
def frames():
    frame = sys._getframe()
    while frame:
        yield frame
        frame = frame.f_back
script = [frame for frame in frames() if 'succeed' in frame.f_globals][-1]
names = script.f_globals
"""


@pytest.mark.parametrize(
    "program",
    [
        "import os, contextlib\nfor fd in range(3, 64):\n    with contextlib.suppress(OSError):\n"
        "        os.write(fd, b'passed')\nos._exit(0)",
        "import os\nos.mkdir('passed')",
        "import os\nos.mkfifo('passed')\nos._exit(0)",
        f"{FRAMES}names['succeed']()",
        f"{FRAMES}names['main']('x = 1')",
        f"{FRAMES}exec(script.f_code, {{**names, 'PROGRAM': 'x = 1'}})",
        f"{FRAMES}import os\nos._exit = lambda code: None\nnames['say'] = print\nraise ValueError",
        f"{FRAMES}import atexit\natexit.register(names['succeed'])\nraise ValueError",
        f"{FRAMES}sys.settrace(lambda *a: None)\nraise ValueError",
        f"{FRAMES}names['say'] = lambda text: names['succeed']()\nraise ValueError",
        f"{FRAMES}import weakref\nclass R(weakref.ref):\n    go = staticmethod(names['succeed'])\n"
        "class E(Exception): pass\nimport operator\nerror = E()\nref = R(error, operator.methodcaller('go'))\nraise error",
        "try:\n    open('/x')\nexcept PermissionError as e:\n    f = e.__traceback__.tb_next.tb_frame\n"
        "    f.f_locals.update(success=(None, None), refused=())\nimport os\nos.mkdir('passed')",
        "import os\nos.open = None\nos.mkdir.__self__\nos.execv('/bin/true', ['true'])",
        "import signal\nsignal.raise_signal(signal.SIGTERM)",
    ],
)
def test_passing_cannot_be_claimed(program: str) -> None:
    """Neither by what is said, nor by what is found in the frames of the script around it."""
    assert not run_program(program, seconds=1).passed


def test_a_system_without_limits_says_so(monkeypatch: pytest.MonkeyPatch, wall: str) -> None:
    monkeypatch.setattr(sandbox, "_SCRIPT", "raise SystemExit")
    with pytest.raises(MachineError, match="Python does not start"):
        run_program("x = 1")
    monkeypatch.setattr(sandbox, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="evaluate code on Linux"):
        run_program("x = 1")
