"""Renewing the code of routed checkpoints: they run by files beside their weights, which age with transformers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moerge.architecture.sequence import HETEROGENEOUS, MODEL_TYPE
from moerge.architecture.token_mixture import MODEL_TYPE as BY_TOKEN
from moerge.checkpoint.manifest import read_manifest, sealed, to_json
from moerge.checkpoint.reader import read_json
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError, MachineError
from moerge.files import atomic_path, read_file
from moerge.modeling import AUTO_MAP, HETEROGENEOUS_AUTO_MAP, TOKEN_AUTO_MAP, code_files
from moerge.tensors.digest import file_digest

_CONFIG = "config.json"
_AUTO_MAPS = {MODEL_TYPE: AUTO_MAP, HETEROGENEOUS: HETEROGENEOUS_AUTO_MAP, BY_TOKEN: TOKEN_AUTO_MAP}


@dataclass(frozen=True)
class Refreshed:
    """The files that were written and removed, none where all were current; `warnings` name those edited by hand."""

    folder: Path
    written: tuple[str, ...]
    removed: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Everything for `--json`."""
        return {"checkpoint": str(self.folder), "written": list(self.written), "removed": list(self.removed)}


def refresh(location: str | Path) -> Refreshed:
    """Replace the code of a routed checkpoint by this moerge's, and its digests in the manifest; no tensor is read or written.

    The manifest is replaced first, marked as unfinished, and last: after an interruption `verify` names what differs, and running
    again completes it.

    Raises:
        InputError: the checkpoint runs by code of transformers, or one of its files is a link, whose target belongs to others.
    """
    folder = Path(location)
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}: download a Hub model with `hf download --local-dir` to refresh it", code="not-found"
        )
    config = read_json(folder / _CONFIG)
    auto_map = _AUTO_MAPS.get(str(config.get("model_type")))
    if auto_map is None:
        raise InputError(f"{folder} is of type {config.get('model_type')!r} and carries no code of moerge: it needs no refresh")
    manifest = read_manifest(folder)
    current = {name: path.read_bytes() for name, path in code_files(auto_map).items()}
    if config.get("auto_map") != auto_map:
        current[_CONFIG] = to_json({**config, "auto_map": auto_map})
    before = {path.name: read_file(path) for path in _replaceable(folder, {*current, MANIFEST})}
    written = {name: content for name, content in current.items() if before.get(name) != content}
    removed = sorted(before.keys() - current.keys())
    unfinished = manifest is not None and bool(manifest.get("refreshed", {}).get("unfinished"))
    digests = manifest["files"] if manifest is not None and not unfinished else {}
    code = [name for name in (*written, *removed) if name in before and name in digests and name != _CONFIG]
    edited = [name for name in code if digests[name] != file_digest(before[name])]
    if written or removed or unfinished:
        _write(folder, _manifest(manifest, written, removed, unfinished=True) | written, removed)
        _write(folder, _manifest(manifest, written, removed), [])
    return Refreshed(
        folder,
        tuple(sorted(written)),
        tuple(removed),
        tuple(f"{folder / name} was changed after the merge, and the change is gone" for name in edited),
    )


def _replaceable(folder: Path, names: set[str]) -> list[Path]:
    """The files of code that are there, and the config; InputError where one of them is a link."""
    found = [path for path in folder.iterdir() if path.name in names or path.name.endswith("_moerge.py")]
    link = next((path for path in found if path.is_symlink()), None)
    if link:
        raise InputError(f"{link} is a link, as in the Hub's cache: refresh a copy of the folder that has the files themselves")
    return [path for path in found if path.name != MANIFEST]


def _manifest(
    manifest: Mapping[str, Any] | None, written: Mapping[str, bytes], removed: list[str], **state: bool
) -> dict[str, bytes]:
    if manifest is None:
        return {}
    files = {name: digest for name, digest in manifest["files"].items() if name not in removed}
    files |= {name: file_digest(content) for name, content in written.items()}
    refreshed = {"moerge": version("moerge"), **state}
    return {MANIFEST: sealed({**manifest, "files": dict(sorted(files.items())), "refreshed": refreshed})}


def _write(folder: Path, contents: Mapping[str, bytes], removed: list[str]) -> None:
    """Write all of them beside what they replace, then rename one after the other and remove the rest."""
    try:
        with ExitStack() as renames:
            for name, content in reversed(list(contents.items())):
                renames.enter_context(atomic_path(folder / name)).write_bytes(content)
        for name in removed:
            (folder / name).unlink()
    except OSError as error:
        raise MachineError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None
