"""Writing a checkpoint folder beside its target and renaming it at the end.

What carries the target's name is complete. The staging folder holds the checkpoint and, beside it, a journal of finished
tensors with their digests; an interrupted run resumes from it after checking the bytes, so nothing depends on what a crash
left in which order.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np

from moerge.checkpoint.header import build_header
from moerge.checkpoint.reader import INDEX, WEIGHTS
from moerge.checkpoint.workspace import Workspace, machine_errors, write_files
from moerge.errors import InputError, SourceChangedError
from moerge.system import RandomAccess
from moerge.tensors.digest import CHUNK, chunk_digest, tensor_digest
from moerge.tensors.spec import TensorSpec

JOURNAL = "journal.jsonl"
MANIFEST = "moerge.json"
STATISTICS = "router_statistics"
"""The folder in a mixture with what its router was computed from: with it, an expert can be added later."""

_CHECKPOINT = "checkpoint"

Start = Literal["new", "resume", "restart"]


def staging_folder(target: Path) -> Path:
    """Return the hidden sibling folder in which a checkpoint is built, so that the final rename is atomic."""
    return workspace(target).root


def workspace(target: Path) -> Workspace:
    """The hidden folder of merges into a target, whoever works there."""
    return Workspace(target, "partial", lock=JOURNAL, marker=_CHECKPOINT)


def assign_shards(outputs: Sequence[TensorSpec], limit: int, stem: str = Path(WEIGHTS).stem) -> dict[str, list[TensorSpec]]:
    """Outputs by shard file name, from `stem` on; each shard has at most `limit` bytes, unless one tensor alone is larger."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups)}


@dataclass(frozen=True)
class _Place:
    file: RandomAccess
    offset: int

    def read(self, start: int, count: int, itemsize: int) -> bytearray:
        content = bytearray(count * itemsize)
        self.file.read_into(memoryview(content), self.offset + start * itemsize)
        return content


class Staging(Workspace):
    """A checkpoint being written; a context manager that closes its files, and a Store for the executor."""

    def __init__(self, target: Path, shards: Mapping[str, Sequence[TensorSpec]], fingerprint: str, start: Start = "new") -> None:
        super().__init__(target, "partial", lock=JOURNAL, marker=_CHECKPOINT)
        self.folder = self.root / _CHECKPOINT
        self._shards, self._fingerprint = shards, fingerprint
        self._entries: dict[str, dict[str, Any]] = {}
        self._places: dict[str, _Place] = {}
        self._files: list[RandomAccess] = []
        self._journal_lock = threading.Lock()
        try:
            with machine_errors(self.root):
                self._open(start)
        except BaseException:
            self._close_shards()
            self.close()
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
        self._journal = self.acquire()
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
        self._journal.seek(0)
        entries: list[dict[str, Any]] = []
        for line in self._journal:
            try:
                entries.append(_entry(line, first=not entries))
            except ValueError:
                break  # the line that was being written when the run was killed, or a damaged one
        if not entries:
            return
        if entries[0]["fingerprint"] != self._fingerprint:
            raise InputError(
                f"the interrupted run in {self.root} had another recipe, other inputs or options: "
                "run it as it was, or start over with --force",
                code="resume-differs",
            )
        self._entries = {entry["tensor"]: entry for entry in entries[1:]}

    def _append(self, entry: Mapping[str, object]) -> None:
        line = json.dumps(entry).encode() + b"\n"
        if self._journal.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _open_shard(self, shard: str, outputs: Sequence[TensorSpec]) -> None:
        # wider elements first keeps every tensor aligned, as the safetensors library does
        ordered = sorted(outputs, key=lambda output: -output.dtype.itemsize)
        header, offsets = build_header([(o.name, o.dtype, o.shape) for o in ordered], {"format": "pt"})
        file = RandomAccess(self.folder / shard, write=True)
        self._files.append(file)
        size = len(header) + sum(output.nbytes for output in outputs)
        if file.size != size:
            file.allocate(size)
        file.write(header, 0)
        self._places |= {name: _Place(file, offset) for name, offset in offsets.items()}

    def write(self, output: TensorSpec, start: int, data: np.ndarray) -> None:
        """Elements `start` and following of an output, in its storage type."""
        place = self._places[output.name]
        with machine_errors(self.root):
            place.file.write(data.view(np.uint8).data, place.offset + start * output.dtype.itemsize)

    def done(self, output: TensorSpec, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """Journal a complete output."""
        entry = {"tensor": output.name, "digest": digest, "inputs": inputs, "nonfinite": nonfinite}
        with machine_errors(self.root), self._journal_lock:
            self._entries[output.name] = entry
            self._append(entry)

    def finished(self, output: TensorSpec) -> bool:
        """Return whether the journal has this output and its bytes are still what the journal says."""
        entry = self._entries.get(output.name)
        if entry is None:
            return False
        return self.stored_digest(output) == str(entry["digest"])

    def stored_digest(self, output: TensorSpec) -> str:
        """The digest of what has been written for an output."""
        place = self._places[output.name]
        read = (
            place.read(start, min(CHUNK, output.size - start), output.dtype.itemsize) for start in range(0, output.size, CHUNK)
        )
        return tensor_digest(chunk_digest(chunk) for chunk in read)

    def add(self, files: Mapping[str, bytes]) -> None:
        """Write other files now, so that the folder can be loaded before it is published; `publish` writes its own."""
        with machine_errors(self.root):
            write_files(self.folder, self._with_index(files))

    def complete(self, files: Mapping[str, bytes], *, replace: bool) -> None:
        """Add the other files, make everything durable, and give the folder the target's name."""
        with machine_errors(self.root):
            files = self._with_index(files)
            for path in self.folder.rglob("*"):
                name = path.relative_to(self.folder)
                if path.is_file() and name.parts[0] != STATISTICS and name.as_posix() not in {*files, *self._shards}:
                    path.unlink()
            self._close_shards()  # Windows renames no folder with open files
            self.publish(self.folder, files, replace=replace)

    def _with_index(self, files: Mapping[str, bytes]) -> Mapping[str, bytes]:
        if len(self._shards) == 1:
            return files
        weight_map = {o.name: shard for shard, outputs in self._shards.items() for o in outputs}
        total = sum(o.nbytes for outputs in self._shards.values() for o in outputs)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        name = INDEX.replace(Path(WEIGHTS).stem, next(iter(self._shards)).partition("-")[0], 1)
        return {**files, name: (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close_shards()
        if isinstance(error, (InputError, SourceChangedError)):
            self.discard()
        self.close()

    def _close_shards(self) -> None:
        for file in self._files:
            file.close()


def _entry(line: bytes, *, first: bool) -> dict[str, Any]:
    """A line of the journal; ValueError where it is none."""
    entry = json.loads(line)
    kinds = {"fingerprint": str} if first else {"tensor": str, "digest": str, "inputs": dict, "nonfinite": list}
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        raise ValueError("no line of a journal")
    if not all(isinstance(text, str) for text in (*entry.get("inputs", {}).values(), *entry.get("nonfinite", ()))):
        raise ValueError("no labels and digests")
    return entry
