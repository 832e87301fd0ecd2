"""This machine made to look like another one: a process that runs this script has no Unix-only modules and functions.

`python other_systems.py SCRIPT` first takes away what Windows lacks and refuses what Windows refuses: folders that are opened,
renaming a folder in which a file is open, removing an open file, opening a file without O_BINARY. Then it runs SCRIPT.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = ("fcntl", "resource", "pwd", "grp", "termios")
FUNCTIONS = (
    *("preadv", "pread", "pwrite", "pwritev", "posix_fallocate", "sched_getaffinity", "sysconf", "killpg"),
    *("setuid", "setgid", "setgroups", "getuid", "geteuid", "fork", "mkfifo"),
)
BINARY = 1 << 28


def _open_files() -> set[str]:
    places = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return {os.readlink(place) for place in places if os.path.exists(place)}


def _ours(name: str) -> bool:
    return "/src/moerge/" in name and "contained" not in name


def take_away() -> None:
    """Make this process one on such a machine."""
    import ctypes

    for module in MODULES:
        sys.modules[module] = None  # type: ignore[assignment]
    for function in FUNCTIONS:
        if hasattr(os, function):
            delattr(os, function)
    real_open, real_rename, real_unlink, real_library = os.open, os.rename, os.unlink, ctypes.CDLL

    def opened(path: Any, flags: int, mode: int = 0o777, **rest: Any) -> int:
        if os.path.isdir(path) and "dir_fd" not in rest and not flags & os.O_DIRECTORY:
            raise PermissionError(13, "Permission denied", str(path))
        if _ours(sys._getframe(1).f_code.co_filename):
            assert flags & BINARY, f"{path} was opened without O_BINARY"
        return real_open(path, flags & ~BINARY, mode, **rest)

    def renamed(old: Any, new: Any, **rest: Any) -> None:
        if os.path.lexists(new):
            raise FileExistsError(17, "File exists", str(new))
        inside = [file for file in _open_files() if Path(file).is_relative_to(os.path.abspath(old))]
        if inside:
            raise PermissionError(13, f"Permission denied, since {inside[0]} is open", str(old))
        real_rename(old, new, **rest)

    def unlinked(path: Any, **rest: Any) -> None:
        if "dir_fd" not in rest and os.path.realpath(path) in _open_files():
            raise PermissionError(13, "Permission denied, since it is open", str(path))
        real_unlink(path, **rest)

    def library(name: Any, *rest: Any, **keywords: Any) -> Any:
        if name is None:
            raise TypeError("argument of type 'NoneType' is not iterable")
        return real_library(name, *rest, **keywords)

    replacements: dict[str, Callable[..., Any]] = {"open": opened, "rename": renamed, "unlink": unlinked}
    for name, replacement in replacements.items():
        setattr(os, name, replacement)
    os.O_BINARY = BINARY  # type: ignore[attr-defined]
    ctypes.CDLL = library  # type: ignore[assignment, misc]


if __name__ == "__main__":
    for library in ("numba", "safetensors", "psutil", "subprocess", "tempfile", "moerge.tensors.kernels"):
        with suppress(ImportError):  # the libraries are those of this machine
            import_module(library)
    for module in [name for name in sys.modules if name.startswith("moerge")]:
        del sys.modules[module]
    take_away()
    sys.path.insert(0, str(Path(__file__).parents[2]))
    exec(compile(sys.argv[1], "script", "exec"), {"__name__": "__main__"})
