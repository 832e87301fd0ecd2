"""Files that are whole whenever they carry their name, on the disk when that is asked for, and of bounded size when read."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from moerge.errors import InputError, MachineError, SourceChangedError
from moerge.system import lock

LONGEST_NAME = 230
"""Bytes: 255 on the usual file systems, with room for the names of what lies beside a target until it is complete."""


class FileState(NamedTuple):
    """The state by which a file that was overwritten or replaced is noticed."""

    size: int
    modified_ns: int
    inode: int
    changed_ns: int

    @classmethod
    def of(cls, place: Path | int) -> FileState:
        """The state of a path or an open file."""
        about = os.stat(place)
        return cls(about.st_size, about.st_mtime_ns, about.st_ino, about.st_ctime_ns)

    def differs(self, other: FileState) -> bool:
        """Tell other content; another number alone is not: some network file systems number their files anew."""
        renumbered = self.inode != other.inode and self.changed_ns != other.changed_ns
        return renumbered or self[:2] != other[:2]


@dataclass(frozen=True, order=True)
class SourceFile:
    """A file in the state in which it was first read; without a state it is not on this machine yet."""

    path: Path
    state: FileState | None = None

    @property
    def name(self) -> str:
        """The file's name in its folder."""
        return self.path.name

    @property
    def stamp(self) -> tuple[str, int, int]:
        """Name, size and time, by which a later process knows it again."""
        assert self.state is not None
        return self.name, self.state.size, self.state.modified_ns

    @property
    def identity(self) -> tuple[str, int, int, int]:
        """The stamp and the time that no copy keeps and no program sets, by which a replaced file is noticed on this machine."""
        assert self.state is not None
        return *self.stamp, self.state.changed_ns

    def check(self, now: FileState) -> None:
        """SourceChangedError if the file is in another state now."""
        if self.state is not None and self.state.differs(now):
            raise self.changed("overwritten or replaced")

    def changed(self, what: str) -> SourceChangedError:
        """The error to raise where something happened to the file."""
        return SourceChangedError(
            f"{self.path} was {what} while it was in use, so nothing was written: run the command again once nothing changes it"
        )

    def check_here(self) -> None:
        """SourceChangedError if what has the file's name now is not what was read."""
        if self.state is None:
            return
        try:
            self.check(FileState.of(self.path))
        except FileNotFoundError:
            raise self.changed("removed") from None


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """SourceChangedError if one of the files is not what it was when it was first read."""
    for file in files:
        file.check_here()


_IN_USE, _SECONDS_TO_LOCK = ".in-use", 60
LONGEST_LABEL = 80
"""Characters of a name in a recipe that files are called after: at most three bytes each, as long as nobody is out to do harm."""


def as_path(value: Any, what: str) -> Path:
    """A path that was given to a function. InputError for what is no path; `~` is the home folder."""
    if not isinstance(value, str | os.PathLike) or "\0" in (text := os.fspath(value)):
        raise InputError(f"{what} should be a path, not {str(value)!r}")
    return Path(text)


def is_file(path: Path) -> bool:
    """Return whether there is a file of this name; there is none of a name that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def check_target_name(target: Path) -> None:
    """InputError where no folder of this name can be made: beyond a file, for a link to nothing, too long."""
    try:
        if target.is_symlink() and not target.exists():
            raise InputError(f"{target} is a link to something that is not there: remove it, or choose another folder")
        above = next((path for path in target.absolute().parents if path.exists()), None)
    except OSError as error:
        raise InputError(f"{str(target)[:200]!r} cannot be a folder: {error.strerror}") from None
    if above is None or not target.name:
        raise InputError(f"{target} is no name for a folder: choose another")
    if not above.is_dir():
        raise InputError(f"{target} would lie in {above}, which is a file: choose another folder")
    if len(os.fsencode(target.name)) > LONGEST_NAME:
        raise InputError(f"the name {target.name[:40]}... is too long for a folder: choose a shorter one")


def check_target(target: Path, sources: Iterable[tuple[str, Path]], *, marks: Sequence[str], force: bool) -> None:
    """InputError where a folder of this name must not be written: it lies in a source or holds one, or exists.

    With `force` it may exist if it is empty or has one of the files by which results are known (`marks`).
    """
    check_target_name(target)
    real = target.resolve()
    for name, folder in sources:
        source = folder.resolve()
        if real == source or source in real.parents:
            raise InputError(f"the output {target} lies in {name}'s own folder: choose another one")
        if real in source.parents and target.exists():
            raise InputError(f"{name} lies in the output {target} and would be replaced with it: choose another output")
    if target.exists() and not force:
        raise InputError(f"{target} already exists: choose another folder, or replace it with --force", code="target-exists")
    ours = any((target / mark).exists() for mark in marks)
    if target.exists() and not ours and (not target.is_dir() or any(target.iterdir())):
        raise InputError(
            f"{target} is not a checkpoint that moerge made, so --force does not replace it: remove it yourself",
            code="target-exists",
        )


def target_of(out: str | Path) -> Path:
    """The absolute path of a folder to be written, also from one with `~`.

    A link to an empty folder stands for that folder, on its own disk.
    """
    target = Path(os.path.abspath(os.path.expanduser(as_path(out, "the output"))))
    empty = os.path.islink(target) and target.is_dir() and not any(target.iterdir())
    return target.resolve() if empty else target


MOST_BYTES = 256_000_000
"""Largest file that is read whole, where it holds neither weights nor text. Tokenizers of a million tokens have a fifth."""
_OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading bytes. OSError also for a pipe or a device, which may never end, and a folder."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def read_file(path: Path, most: int = MOST_BYTES) -> bytes:
    """Bytes of a file. FileNotFoundError where there is none; InputError or MachineError where it is too large or unreadable."""
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise InputError(f"cannot read {path}: it has {size:,} bytes, more than any such file needs ({most:,})")
            return file.read()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> InputError | MachineError:
    """An error that says why a file cannot be read: the machine's where no other file could be read either."""
    kind = MachineError if error.errno in _OF_THE_MACHINE else InputError
    return kind(f"cannot read {path}: {error.strerror or error}")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, this process's own: it takes that name at the end, or is removed if the block fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or complete, its folder made if need be. MachineError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from None


class TemporaryFolder:
    """A folder that is removed with this."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="moerge-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A temporary folder, removed at the end. Those of this prefix whose process was killed are removed before."""
    with tempfile.TemporaryDirectory(prefix=prefix) as name, open(Path(name) / _IN_USE, "wb") as file:
        folder = Path(name)
        lock(file)
        with open(folder / _IN_USE, "rb") as again:
            locks_work = not lock(again)
        for old in folder.parent.glob(f"{prefix}*") if locks_work else ():
            with suppress(OSError), open(old / _IN_USE, "rb") as left:
                if time.time() - os.fstat(left.fileno()).st_mtime > _SECONDS_TO_LOCK and lock(left):
                    shutil.rmtree(old, ignore_errors=True)
        yield folder
