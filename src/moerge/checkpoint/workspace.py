"""A hidden folder beside a target, in which one process makes what gets the target's name once it is complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from moerge import system
from moerge.errors import InputError, MachineError

REPLACED = "replaced"


class Workspace:
    """The folder `root` with a file whose lock keeps other processes away, and `marker`, which is there if a run can go on."""

    def __init__(self, target: Path, kind: str, *, lock: str, marker: str = "") -> None:
        self.target, self.root = target, target.parent / f".{target.name}.moerge-{kind}"
        self._lock_path, self._marker = self.root / lock, self.root / marker
        self._lock_file: FileIO | None = None

    @property
    def interrupted(self) -> bool:
        """Tell that a run that did not come to its end has left something to go on from."""
        return self._marker.exists()

    @property
    def in_use(self) -> bool:
        """Tell that another process works here right now."""
        try:
            with open(self._lock_path, "rb", buffering=0) as file:
                return not system.lock(file, shared=True)
        except OSError:
            return False

    def busy(self) -> InputError:
        """The error for the second of two processes that write the same target."""
        return InputError(
            f"another moerge is writing {self.target} right now: wait for it, or choose another folder", code="busy"
        )

    def acquire(self) -> FileIO:
        """Make the folder and take its lock; the locked file. InputError if another process has it."""
        self.root.mkdir(parents=True, exist_ok=True)
        # unbuffered: on a full disk, closing a file with something left to write fails once more
        self._lock_file = open(self._lock_path, "a+b", buffering=0)  # noqa: SIM115
        if not system.lock(self._lock_file) or not self._lock_path.exists():  # gone: it has just finished
            raise self.busy()
        return self._lock_file

    def publish(self, folder: Path, files: Mapping[str, bytes], *, replace: bool) -> None:
        """Add files to a folder in here, make all of it durable, give it the target's name, and remove the rest."""
        write_files(folder, files)
        make_all_durable(folder)
        take_name(folder, self.target, aside=self.root / REPLACED, replace=replace)
        system.make_durable(self.target.parent)
        self.remove()

    def empty(self) -> None:
        """Remove everything but the lock, and first of all what a run would go on from."""
        for path in sorted(self.root.iterdir(), key=lambda path: path != self._marker):
            if path != self._lock_path:
                _remove(path)

    def remove(self) -> None:
        """Remove the folder, and last of all its lock, which keeps others away from it."""
        self.empty()
        try:
            self._lock_path.unlink()
        except PermissionError:  # Windows does not remove what is open
            self.close()
            self._lock_path.unlink()
        with suppress(OSError):  # another run may have begun
            self.root.rmdir()

    def clear(self) -> None:
        """Remove what a process has left that was killed, and is not there any more."""
        if self.root.exists() and not self.in_use:
            shutil.rmtree(self.root, ignore_errors=True)

    def discard(self) -> None:
        """Remove the folder of a run that has failed."""
        if os.name == "nt":
            self.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def close(self) -> None:
        """Let others in."""
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None


class machine_errors:
    """Turns the operating system's errors while writing below `folder` into MachineError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, OSError) or isinstance(error, MachineError):
            return
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise MachineError(
                f"no space left for {self.folder.parent}: free some and run the same command again with --resume", code="no-space"
            ) from None
        raise MachineError(f"cannot write {error.filename or self.folder}: {error.strerror or error}") from None


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their names below a folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def make_all_durable(folder: Path) -> None:
    """Flush everything in a folder, and its own list of names, to the disk."""
    for path in (*folder.rglob("*"), folder):
        system.make_durable(path)


def take_name(folder: Path, target: Path, *, aside: Path, replace: bool) -> None:
    """The target's name goes from one complete folder to the other; where the system can, there is no moment without.

    What had the name is afterwards called `folder` or `aside`.
    """
    if not replace or not target.exists():
        os.rename(folder, target)
    elif not system.exchange(folder, target):
        _remove(aside)
        os.rename(target, aside)
        os.rename(folder, target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
