"""The hidden folder beside OUT where a tuning lives until it is finished: tokens, targets, checkpoints, metrics, the result."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moerge.checkpoint.manifest import damaged_files, read_manifest, to_json
from moerge.checkpoint.reader import open_folder, read_json
from moerge.checkpoint.staging import MANIFEST
from moerge.checkpoint.workspace import Workspace, machine_errors, make_all_durable
from moerge.errors import InputError
from moerge.files import atomic_write, check_target
from moerge.system import make_durable, umask

FACTS = "tune.json"
METRICS = "metrics.jsonl"
_BEGUN, _COMPLETE = "facts.json", "complete"
_FREE = ("save_every", "processes", "device", "dying")
"""Settings that may change when a tuning is continued: they do not change what is computed."""


class RunDirectory(Workspace):
    """One process holds its lock; `close` lets go of it."""

    def __init__(self, target: Path) -> None:
        super().__init__(target, "tuning", lock="lock", marker=_BEGUN)
        self.tokens, self.targets, self.result = self.root / "tokens", self.root / "targets", self.root / "result"
        self.unsharded = self.root / "unsharded"
        self.checkpoints, self.metrics = self.root / "checkpoints", self.root / METRICS
        self.tensorboard_dir = self.root / "tensorboard"
        self.is_new = False

    def open(self, facts: Mapping[str, Any], sources: Mapping[str, Path], *, resume: bool, force: bool) -> None:
        """Begin or continue. `facts` are settings and inputs, `sources` the folders of the models that are read.

        Raises InputError where OUT must not be written, or is being written, or what is continued was something else.
        """
        check_target(self.target, sources.items(), marks=(FACTS, MANIFEST), force=force)
        if self.interrupted and not (resume or force):
            raise InputError(
                f"an interrupted tuning into {self.target} lies there: continue it with --resume, or start over with --force",
                code="interrupted-run-exists",
            )
        with machine_errors(self.root):
            self.acquire()
            if self.interrupted and resume:
                self._compare(read_json(self.root / _BEGUN), facts)
            else:
                self.empty()
                self.is_new = True
            for folder in (self.tokens, self.targets, self.checkpoints):
                folder.mkdir(exist_ok=True)
            atomic_write(self.root / _BEGUN, to_json(facts))
            for folder in self.checkpoints.iterdir():
                if not (folder / _COMPLETE).exists():
                    shutil.rmtree(folder)
            shutil.rmtree(self.result, ignore_errors=True)

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for part, key in _differences(before, now):
            raise InputError(
                f"the interrupted tuning in {self.root} had another {key} ({part}): "
                "continue it as it was, or start over with --force",
                code="resume-differs",
            )

    def finished(self, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the tune.json of OUT if it is an undamaged result of the same settings and models."""
        try:
            written, manifest = read_json(self.target / FACTS), read_manifest(self.target)
            tensors = open_folder(self.target).tensors
        except InputError:
            return None
        same = not any(_differences({part: written.get(part) for part in facts}, facts))
        intact = manifest and tensors.keys() == manifest["tensors"].keys() and not damaged_files(self.target, manifest)
        return written if same and intact else None

    def latest(self) -> Path | None:
        """The newest complete training checkpoint."""
        found = [folder for folder in self.checkpoints.iterdir() if (folder / _COMPLETE).exists()]
        return max(found, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)

    def complete(self, files: Mapping[str, bytes], *, replace: bool) -> None:
        """Add files to the result, make it durable, give it the target's name, and remove everything else."""
        with machine_errors(self.root):
            if self.tensorboard_dir.exists():
                shutil.copytree(self.tensorboard_dir, self.result / self.tensorboard_dir.name)
            for path in self.result.rglob("*"):  # safetensors makes files that nobody else can read
                path.chmod((0o666 if path.is_file() else 0o777) & ~umask())
            self.publish(self.result, files, replace=replace)

    def discard(self) -> None:
        """Remove what this run began, unless it has come as far as a training checkpoint."""
        if self.is_new and not (self.checkpoints.is_dir() and self.latest()):
            super().discard()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (part, key) of facts that differ and decide what is computed."""
    for part in sorted({*before, *now}):
        was, wanted = (value if isinstance(value, dict) else {} for value in (before.get(part), now.get(part)))
        for key in sorted({*was, *wanted} - set(_FREE if part == "settings" else ())):
            if was.get(key) != wanted.get(key):
                yield part, key


def mark_complete(checkpoint: Path) -> None:
    """Say that a training checkpoint is whole, once it is on the disk."""
    make_all_durable(checkpoint)
    (checkpoint / _COMPLETE).touch()
    make_durable(checkpoint)
