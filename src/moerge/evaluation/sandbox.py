"""Running a program that a model wrote: in a process of its own, with limits, and only to see whether it ends well.

The limits are the kernel's (time, memory, processes, sizes of files) and, where the kernel has none, an audit hook of Python
that refuses files, processes and sockets. They keep a clumsy program from doing harm. They are no wall against a malicious
one: run models that you do not trust in a container or a virtual machine.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moerge.errors import MachineError

SECONDS = 10.0
"""Of processor time: a verdict must not depend on what else the machine does."""
_PATIENCE = 5
"""Wall-clock time for each second of processor time, for programs that wait."""
MEMORY_BYTES = 2**30
_SAID_BYTES = 400
_NOBODY = 65534


@dataclass(frozen=True)
class Outcome:
    """Whether a program ran to its last line, and if not, why."""

    passed: bool
    reason: str


def run_program(program: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run a Python program; it passes if its last line was reached and nothing was raised before.

    A program that ends early has not passed, whatever its exit code. It gets an empty folder of its own that is removed
    afterwards, no environment, no input; what it prints is dropped. It may neither write to files nor start processes or
    threads, nor read files but Python's own. `seconds` are of processor time. Raises MachineError where the system cannot set
    the limits.
    """
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="moerge-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o777)  # the program may run as nobody
        said = _run(_source(program, token, seconds, memory_bytes), folder, seconds)
    if said is None:
        return Outcome(False, f"took longer than {seconds:g} s")
    kind, _, rest = said.partition(":")
    if kind == "no limits":
        raise MachineError(
            f"this system cannot limit what generated code does ({rest}): evaluate code on Linux, as a user other than root"
        )
    if kind == token:
        return Outcome(True, "")
    return Outcome(False, rest if kind == "raised" else "ended before its last line")


def _source(program: str, token: str, seconds: float, memory_bytes: int) -> str:
    facts = {
        "PROGRAM": program,
        "TOKEN": token,
        "SECONDS": math.ceil(seconds),
        "MEMORY": memory_bytes,
        "NOBODY": _NOBODY,
        "SAID": _SAID_BYTES,
    }
    # as literals: the program's own text never becomes part of this script's code
    return "".join(f"{name} = {value!a}\n" for name, value in facts.items()) + _SCRIPT


def _run(source: str, folder: str, seconds: float) -> str | None:
    """What the process said through a pipe, which holds more than it may say; None if it had to be killed."""
    reading, writing = os.pipe()
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "STATUS": str(writing)}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a pool of threads could not start
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-"],
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
        if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
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
