"""Files that are whole whenever they carry their name, and on the disk when that is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moerge.errors import InputError, MachineError

_LONGEST_NAME = 230
"""Bytes: 255 on the usual file systems, with room for the names of what lies beside a target until it is complete."""


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
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise InputError(f"the name {target.name[:40]}... is too long for a folder: choose a shorter one")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to, this process's own: it takes that name at the end, or is removed if the block fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either the old one or complete, its folder made if need be. MachineError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            beside.write_bytes(content)
    except OSError as error:
        raise MachineError(f"cannot write {path}: {error.strerror or error}") from None


def make_durable(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
