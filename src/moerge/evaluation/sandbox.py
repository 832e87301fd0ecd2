"""Running a program that a model wrote: in a process of its own, with limits, and only to see whether it ends well.

The limits are the kernel's (time, memory, processes, sizes of files). Around them is bubblewrap where it works: no network, and
a file system with nothing in it but Python. Where it does not, an audit hook of Python that refuses files, processes and sockets
has to do, which keeps a clumsy program from doing harm and is no wall against a malicious one.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from moerge.errors import MachineError

SECONDS = 10.0
"""Of processor time: a verdict must not depend on what else the machine does."""
_PATIENCE = 5
"""Wall-clock time for each second of processor time, for programs that wait."""
MEMORY_BYTES = 2**30
_SAID_BYTES = 400
_NOBODY = 65534
_TOOLS = {"bubblewrap": "bwrap", "namespace": "unshare"}
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache")
_PASSED = "passed"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program: success if it ran to its last line, else the reason."""

    passed: bool
    reason: str


def run_program(program: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a Python program; it passes if its last line was reached and nothing was raised before.

    A program that ends early has not passed, whatever its exit code, and nothing that it could find and say makes it pass. It
    gets an empty folder of its own that is removed afterwards, no environment, no input; what it prints is dropped. It may
    neither write to files nor start processes or threads, nor read files but Python's own. `seconds` are of processor time.
    Raises MachineError where the system cannot set the limits.
    """
    if find_spec("resource") is None:
        raise MachineError("this system cannot limit what generated code does: evaluate code on Linux")
    return _run_behind(wall(), program, seconds, memory_bytes)


def describe_wall() -> str:
    """A sentence for the user about what is around generated code on this machine."""
    if wall() == "bubblewrap":
        return "generated code runs in bubblewrap: without a network, and with no files but Python's own"
    network = "without a network" if wall() == "namespace" else "with this machine's network within its reach"
    return (
        f"generated code runs under limits, {network}, but in this machine's file system, since bubblewrap does not work here: "
        "install it, or evaluate models that you do not trust in a container"
    )


@cache
def wall() -> str:
    """The best of what is there and works: "bubblewrap", "namespace" (of its own for the network) or "limits" alone."""
    for name in ("bubblewrap", "namespace"):
        if shutil.which(_TOOLS[name]) and _works(name):
            return name
    return "limits"


def _works(name: str) -> bool:
    try:
        return _run_behind(name, "", SECONDS, MEMORY_BYTES).passed
    except (MachineError, OSError):
        return False


def _run_behind(name: str, program: str, seconds: float, memory_bytes: int) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="moerge-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)  # the program may run as nobody
        source = _source(program, seconds, memory_bytes)
        said = _run(_command(name, folder), source, folder, seconds)
        passed = Path(folder, _PASSED).is_dir()
    if said is None:
        return Outcome(False, f"took longer than {seconds:g} s")
    begun, _, rest = said.partition(":")
    if begun != "begun":
        raise MachineError(
            f"this system cannot limit what generated code does ({rest or 'Python does not start'}): evaluate code on Linux, "
            "as a user other than root"
        )
    if passed:
        return Outcome(True, "")
    kind, _, reason = rest.partition(":")
    return Outcome(False, reason if kind == "raised" else "ended before its last line")


def _source(program: str, seconds: float, memory_bytes: int) -> str:
    facts = {
        "PROGRAM": program,
        "PASSED": _PASSED,
        "SECONDS": math.ceil(seconds),
        "MEMORY": memory_bytes,
        "NOBODY": _NOBODY,
        "SAID": _SAID_BYTES,
    }
    # as literals: the program's own text never becomes part of this script's code
    return "".join(f"{name} = {value!a}\n" for name, value in facts.items()) + _SCRIPT


def _command(name: str, folder: str) -> list[str]:
    python = [sys.executable, "-I", "-B", "-"]
    if name == "bubblewrap":
        return [*_bubblewrap(folder), *python]
    if name == "namespace":
        return ["unshare", "--net", *([] if os.geteuid() == 0 else ["--user"]), "--", *python]
    return python


def _bubblewrap(folder: str) -> list[str]:
    """A file system of Python, its libraries and the program's folder. Root needs its capabilities to become nobody."""
    namespaces = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    rights = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.geteuid() == 0 else ["--unshare-user"]
    paths = [path for path in (*_LIBRARIES, *_python_paths()) if os.path.exists(path)]
    parents = sorted({str(parent) for path in (*paths, folder) for parent in Path(path).parents} - {"/"})
    shown = [part for parent in parents for part in ("--dir", parent)]  # made by name, they are open to nobody too
    shown += [part for path in paths for part in ("--ro-bind", path, path)]
    return ["bwrap", *namespaces, *rights, "--die-with-parent", *shown, "--bind", folder, folder, "--chdir", folder, "--"]


@cache
def _python_paths() -> tuple[str, ...]:
    """Return the folders of Python and its packages, also under the names behind links, such as those of a virtual
    environment.
    """
    script = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix, sys.exec_prefix, *sys.path]))"
    asked = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, check=True)
    paths = [*json.loads(asked.stdout), os.path.dirname(os.path.realpath(sys.executable))]
    return tuple(dict.fromkeys(name for path in paths for name in (os.path.abspath(path), os.path.realpath(path))))


def _run(command: Sequence[str], source: str, folder: str, seconds: float) -> str | None:
    """Return the messages of the process through a pipe, which holds more than it may write; None if it had to be killed."""
    reading, writing = os.pipe()
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "STATUS": str(writing)}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a pool of threads could not start
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            pass_fds=(writing,),
            start_new_session=True,
        )
        try:
            process.communicate(source.encode(), timeout=_PATIENCE * seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill_group(process)
        if process.returncode in {code for number in (signal.SIGXCPU, signal.SIGKILL) for code in (-number, 128 + number)}:
            return None
        os.set_blocking(reading, False)
        try:
            return os.read(reading, 4 * _SAID_BYTES).decode(errors="replace")
        except BlockingIOError:
            return ""
    finally:
        os.close(reading)
        os.close(writing)


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # nobody is left, or only a zombie
        process.kill()
    process.wait()


_SCRIPT = (Path(__file__).parent / "contained.py").read_text(encoding="utf-8")
