"""Running a command as a user would, with its wall time, CPU time and peak anonymous memory."""

from __future__ import annotations

import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.02
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Finished:
    """A command that succeeded. `cpu_seconds` is user and system time of it and of the children it waited for."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_bytes: int
    stdout: str


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None, *, sample: bool = True) -> Finished:
    """Run `command` to its end; RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.perf_counter()
        process = subprocess.Popen([*map(str, command)], stdout=out, stderr=err, env={**os.environ, **_OFFLINE, **(env or {})})
        sampler = _Sampler(process.pid)
        if sample:
            sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        sampler.ended.set()
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            tail = (out.read() + err.read()).decode(errors="replace")[-3000:]
            raise RuntimeError(f"{command[0]} ended with {process.returncode}:\n{tail}")
        return Finished(seconds, usage.ru_utime + usage.ru_stime, sampler.peak, out.read().decode())


class _Sampler(threading.Thread):
    """Takes the maximum of a process tree's RssAnon, every 20 ms."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak = pid, 0
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(_anonymous_bytes(pid) for pid in _tree(self.pid)))


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
