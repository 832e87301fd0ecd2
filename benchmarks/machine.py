"""Facts about the machine that a figure depends on; nothing that names it."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path


def facts(work: Path, threads: int) -> dict[str, str]:
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads used": str(threads),
        "memory": f"{int((_field('/proc/meminfo', 'MemTotal') or '0 kB').split()[0]) / 2**20:.1f} GiB",
        "kernel": platform.release().split("-")[0],
        "file system": _file_system(work),
        "python": platform.python_version(),
        **{name: version(name) for name in ("moerge", "numpy", "numba")},
    }


def available_bytes() -> int:
    """Memory that the page cache and programs can still have."""
    return int((_field("/proc/meminfo", "MemAvailable") or "0 kB").split()[0]) * 1024


def load() -> float:
    """How many processes wanted to run during the last minute."""
    return os.getloadavg()[0]


def _field(path: str, name: str) -> str | None:
    return next((value.strip() for key, value in _pairs(path) if key.strip() == name), None)


def _pairs(path: str) -> Iterator[tuple[str, str]]:
    for line in Path(path).read_text().splitlines():
        key, colon, value = line.partition(":")
        if colon:
            yield key, value


def _file_system(folder: Path) -> str:
    """The type of the mount with the longest matching mount point."""
    best, kind = "", "unknown"
    resolved = folder.resolve()
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, *_ = line.split()
        if len(point) >= len(best) and (resolved == Path(point) or Path(point) in resolved.parents):
            best, kind = point, found
    return kind
