"""Differences of operating systems and file systems: locks, places in files, space, names, durability.

Everything here works without what only some of them have. Where a file system lacks a guarantee, a warning says so once.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO, Any


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


fcntl, msvcrt = _module("fcntl"), _module("msvcrt")
"""What Unix locks with, and what Windows does."""
_BINARY = getattr(os, "O_BINARY", 0)
"""Without it, Windows translates line ends and stops at Ctrl-Z."""
_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOTTY}
_FAR = 1 << 40
"""A place behind every byte: Windows keeps others from reading what is locked."""
_warned: set[str] = set()
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2


class RandomAccess:
    """A file that is read and written at given places, from any thread."""

    def __init__(self, path: Path, *, write: bool = False) -> None:
        self.descriptor = os.open(path, (os.O_RDWR | os.O_CREAT if write else os.O_RDONLY) | _BINARY, 0o666)
        self._lock = threading.Lock()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Read up to as many bytes as `view` has from byte `offset`; how many there were, 0 at the end of the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self.descriptor, [view], offset)
        with self._lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            content = os.read(self.descriptor, len(view))
        view[: len(content)] = content
        return len(content)

    def write(self, view: memoryview | bytes, offset: int) -> None:
        """Write all bytes from byte `offset` on."""
        while len(view):
            count = self._write_some(view, offset)
            view, offset = view[count:], offset + count

    def _write_some(self, view: memoryview | bytes, offset: int) -> int:
        if hasattr(os, "pwrite"):
            return os.pwrite(self.descriptor, view, offset)
        with self._lock:
            os.lseek(self.descriptor, offset, os.SEEK_SET)
            return os.write(self.descriptor, view)

    def allocate(self, size: int) -> None:
        """Make the file empty and this long. Where that is possible, take the space now, so that a full disk is known at once."""
        os.ftruncate(self.descriptor, 0)
        try:
            os.posix_fallocate(self.descriptor, 0, size)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in _CANNOT:
                raise
            os.ftruncate(self.descriptor, size)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self.descriptor).st_size

    def close(self) -> None:
        """Let go of the file."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            self.close()


def lock(file: IO[Any], *, shared: bool = False) -> bool:
    """Lock an open file until it is closed; False if another process has it. Windows has no shared locks, only short ones."""
    try:
        if fcntl is not None:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        elif msvcrt is not None:
            place = file.tell()
            file.seek(_FAR)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                file.seek(place)
        else:
            _warn_of("has no locks", Path(str(file.name)).parent)
    except OSError as error:
        if error.errno not in _CANNOT:
            return False
        _warn_of("has no locks", Path(str(file.name)).parent)
    return True


def _warn_of(what: str, folder: Path) -> None:
    if what in _warned:
        return
    _warned.add(what)
    danger = {
        "has no locks": "another moerge that writes the same folder at the same time goes unnoticed",
        "has no durable names": "a loss of power in the next seconds may undo the last renaming",
    }
    logging.getLogger("moerge").warning("warning: the file system of %s %s: %s", folder, what, danger[what])


def flush(descriptor: int) -> None:
    """Bring an open file's content to the disk; on macOS, fsync alone only brings it to the disk's cache."""
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not every file system there has it
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def make_durable(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk. A folder's where that is possible."""
    if not path.is_dir():
        _flush_path(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
        return
    try:
        _flush_path(path, os.O_RDONLY)
    except OSError as error:
        if error.errno not in {*_CANNOT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}:
            raise
        if os.name != "nt":  # which makes names durable by itself
            _warn_of("has no durable names", path)


def _flush_path(path: Path, mode: int) -> None:
    descriptor = os.open(path, mode | _BINARY)
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names in one step; False where the system or its file system cannot."""
    names = os.fsencode(one), os.fsencode(other)
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renamex_np"):  # macOS
            return bool(libc.renamex_np(*names, _RENAME_SWAP) == 0)
        return bool(libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)
    except (ImportError, OSError, AttributeError, TypeError):
        return False


def umask() -> int:
    """The process's; it can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def free_memory() -> int:
    """Bytes of memory that are free, by what the system tells: /proc, psutil, or its total; if nothing, 4 GiB."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(ImportError):
        import psutil  # type: ignore[import-untyped, unused-ignore]

        return int(psutil.virtual_memory().available)
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1 << 32
