"""Writing a checkpoint folder beside its target and renaming it at the end.

What carries the target's name is complete. The staging folder holds the checkpoint and, beside it, a journal of finished
tensors with their digests; an interrupted run resumes from it after checking the bytes, so nothing depends on what a crash
left in which order.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from moerge.checkpoint.header import build_header
from moerge.checkpoint.reader import INDEX, WEIGHTS
from moerge.errors import InputError, MachineError, SourceChangedError
from moerge.files import make_durable
from moerge.tensors.digest import CHUNK, chunk_digest, tensor_digest
from moerge.tensors.spec import TensorSpec

JOURNAL = "journal.jsonl"
MANIFEST = "moerge.json"

_CHECKPOINT, _REPLACED = "checkpoint", "replaced"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2

Start = Literal["new", "resume", "restart"]


def staging_folder(target: Path) -> Path:
    """Where a checkpoint is built before it gets its name: a hidden sibling, so that renaming is atomic."""
    return target.parent / f".{target.name}.moerge-partial"


def interrupted(target: Path) -> bool:
    """Whether a run that did not come to its end has left something to resume from."""
    return (staging_folder(target) / _CHECKPOINT).exists()


def being_written(target: Path) -> bool:
    """Whether another process is writing a checkpoint for this target right now."""
    try:
        with open(staging_folder(target) / JOURNAL, "rb", buffering=0) as journal:
            return not _locked(journal, fcntl.LOCK_SH)
    except OSError:
        return False


def busy(target: Path) -> str:
    """What to tell the second of two processes that write the same target."""
    return f"another moerge is writing {target} right now: wait for it, or choose another folder"


def clear(target: Path) -> None:
    """Remove what a run has left that was killed after its checkpoint got its name."""
    if staging_folder(target).exists() and not being_written(target):
        shutil.rmtree(staging_folder(target), ignore_errors=True)


def _locked(file: FileIO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def assign_shards(outputs: Sequence[TensorSpec], limit: int) -> dict[str, list[TensorSpec]]:
    """Outputs by shard file name, each shard at most `limit` bytes unless one tensor alone is larger."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


@dataclass(frozen=True)
class _Place:
    descriptor: int
    offset: int


class Staging:
    """A checkpoint being written; a context manager that closes its files, and a Store for the executor."""

    def __init__(self, target: Path, shards: Mapping[str, Sequence[TensorSpec]], fingerprint: str, start: Start = "new") -> None:
        self.target, self._root = target, staging_folder(target)
        self.folder = self._root / _CHECKPOINT
        self._shards, self._fingerprint = shards, fingerprint
        self._entries: dict[str, dict[str, Any]] = {}
        self._places: dict[str, _Place] = {}
        self._files: dict[str, int] = {}
        self._journal: FileIO | None = None
        self._lock = threading.Lock()
        try:
            with machine_errors(self._root):
                self._open(start)
        except BaseException:
            self._close()
            raise

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the finished outputs by name."""
        return {name: entry["digest"] for name, entry in self._entries.items()}

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the tensors read so far by "model:tensor"."""
        return {label: digest for entry in self._entries.values() for label, digest in entry["inputs"].items()}

    @property
    def nonfinite(self) -> list[str]:
        """Inputs with NaN or infinity among the tensors read so far, as "model:tensor"."""
        return sorted({label for entry in self._entries.values() for label in entry["nonfinite"]})

    def _open(self, start: Start) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        # unbuffered: on a full disk, closing a file with something left to write fails once more
        self._journal = open(self._root / JOURNAL, "a+b", buffering=0)  # noqa: SIM115
        if not _locked(self._journal, fcntl.LOCK_EX) or not (self._root / JOURNAL).exists():  # gone: it has just finished
            raise InputError(busy(self.target))
        if start == "resume":
            self._read_journal()
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(exist_ok=True)
        self._journal.seek(0)
        self._journal.truncate()
        self._append({"fingerprint": self._fingerprint})
        for shard, outputs in self._shards.items():
            self._open_shard(shard, outputs)
        for entry in self._entries.values():
            self._append(entry)

    def _read_journal(self) -> None:
        assert self._journal is not None
        self._journal.seek(0)
        entries: list[dict[str, Any]] = []
        for line in self._journal:
            try:
                entries.append(_entry(line, first=not entries))
            except ValueError:
                break  # the line that was being written when the run was killed, or a damaged one
        if not entries:
            return
        if entries[0].get("fingerprint") != self._fingerprint:
            raise InputError(
                f"the interrupted run in {self._root} had another recipe, other inputs or options: "
                "run it as it was, or start over with --force"
            )
        self._entries = {entry["tensor"]: entry for entry in entries[1:]}

    def _append(self, entry: Mapping[str, object]) -> None:
        assert self._journal is not None
        line = json.dumps(entry).encode() + b"\n"
        if self._journal.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open_shard(self, shard: str, outputs: Sequence[TensorSpec]) -> None:
        # wider elements first keeps every tensor aligned, as the safetensors library does
        ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
        header, offsets = build_header([(o.name, o.dtype, o.shape) for o in ordered], {"format": "pt"})
        descriptor = os.open(self.folder / shard, os.O_RDWR | os.O_CREAT, 0o666)
        self._files[shard] = descriptor
        size = len(header) + sum(output.nbytes for output in outputs)
        if os.fstat(descriptor).st_size != size:
            os.ftruncate(descriptor, 0)
            _allocate(descriptor, size)
        os.pwrite(descriptor, header, 0)
        self._places |= {name: _Place(descriptor, offset) for name, offset in offsets.items()}

    def write(self, output: TensorSpec, start: int, data: np.ndarray) -> None:
        """Elements `start` and following of an output, in its storage type."""
        place = self._places[output.name]
        view, offset = data.view(np.uint8).data, place.offset + start * output.dtype.itemsize
        with machine_errors(self._root):
            while len(view):
                written = os.pwrite(place.descriptor, view, offset)
                view, offset = view[written:], offset + written

    def done(self, output: TensorSpec, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """Journal a complete output."""
        entry = {"tensor": output.name, "digest": digest, "inputs": inputs, "nonfinite": nonfinite}
        with machine_errors(self._root), self._lock:
            self._entries[output.name] = entry
            self._append(entry)

    def finished(self, output: TensorSpec) -> bool:
        """Whether the journal has this output and its bytes are still what the journal says."""
        entry = self._entries.get(output.name)
        if entry is None:
            return False
        place = self._places[output.name]
        itemsize = output.dtype.itemsize
        chunks = range(0, output.size, CHUNK)
        read = (
            os.pread(place.descriptor, min(CHUNK, output.size - start) * itemsize, place.offset + start * itemsize)
            for start in chunks
        )
        return tensor_digest(chunk_digest(chunk) for chunk in read) == str(entry["digest"])

    def add(self, files: Mapping[str, bytes]) -> None:
        """Write other files now, so that the folder can be loaded before it is published; `publish` writes its own."""
        with machine_errors(self._root):
            for name, content in self._with_index(files).items():
                (self.folder / name).write_bytes(content)

    def publish(self, files: Mapping[str, bytes], *, replace: bool) -> None:
        """Add the other files, make everything durable, and give the folder the target's name."""
        with machine_errors(self._root):
            files = self._with_index(files)
            for name, content in files.items():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (self.folder / name).write_bytes(content)
                make_durable(self.folder / name)
            for descriptor in self._files.values():
                os.fsync(descriptor)
            for path in self.folder.rglob("*"):
                if path.is_dir():
                    make_durable(path)
                elif path.relative_to(self.folder).as_posix() not in {*files, *self._shards}:
                    path.unlink()
            make_durable(self.folder)
            self._rename(replace)

    def _rename(self, replace: bool) -> None:
        take_name(self.folder, self.target, aside=self._root / _REPLACED, replace=replace)
        make_durable(self.target.parent)
        for old in (self.folder, self._root / _REPLACED):
            if old.is_symlink():
                old.unlink()
            shutil.rmtree(old, ignore_errors=True)
        (self._root / JOURNAL).unlink()  # last: its lock keeps others away from this folder
        with suppress(OSError):  # another run may have begun
            self._root.rmdir()

    def _with_index(self, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        if len(self._shards) == 1:
            return files
        weight_map = {o.name: shard for shard, outputs in self._shards.items() for o in outputs}
        total = sum(o.nbytes for outputs in self._shards.values() for o in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return {**files, INDEX: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}

    def discard(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, (InputError, SourceChangedError)):
            self.discard()
        self._close()

    def _close(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)
        if self._journal is not None:
            self._journal.close()


def _entry(line: bytes, *, first: bool) -> dict[str, Any]:
    """A line of the journal; ValueError where it is none."""
    entry = json.loads(line)
    kinds = {"fingerprint": str} if first else {"tensor": str, "digest": str, "inputs": dict, "nonfinite": list}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        raise ValueError("no line of a journal")
    return entry


class machine_errors:
    """Turns the operating system's errors while writing below `folder` into MachineError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(error, OSError) or isinstance(error, MachineError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                f"no space left for {self.folder.parent}: free some and run the same command again with --resume"
            ) from None
        raise MachineError(f"cannot write {error.filename or self.folder}: {error.strerror or error}") from None


def _allocate(descriptor: int, size: int) -> None:
    """Take the space now, so that a full disk is known at once; where the system cannot, only set the size."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def take_name(folder: Path, target: Path, *, aside: Path, replace: bool) -> None:
    """The target's name goes from one complete folder to the other; where the system can, there is no moment without.

    What had the name is afterwards called `folder` or `aside`.
    """
    if not replace or not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        os.rename(folder, target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders' names in one step; False where the system or its file system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return bool(swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
