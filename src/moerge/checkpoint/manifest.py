"""The manifest, `moerge.json`: what happened, and the digests by which damage is found later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moerge.checkpoint.companions import is_inside
from moerge.checkpoint.reader import read_json
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.files import read_file
from moerge.tensors.digest import combined_digest, file_digest

FORMAT = 1
"""Version of the manifest's format."""
_SEAL = "manifest_digest"


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Texts(_Part):
    location: str | None = None
    digest: str | None = None
    documents: list[str] | None = None


class _Versions(_Part):
    moerge: str


class _Recipe(_Part):
    merge: dict[str, Any] | None = None
    merge_method: str | None = None
    moe: dict[str, Any] | None = None


class _Manifest(_Part):
    """The keys that moerge reads again; more are written for people."""

    format: Literal[1]
    versions: _Versions
    recipe: _Recipe
    models: dict[str, dict[str, Any]]
    experts: list[str]
    tensors: dict[str, str]
    files: dict[str, str]
    calibration: dict[str, _Texts] = Field(default_factory=dict)
    tuning: dict[str, _Texts] = Field(default_factory=dict)
    refreshed: dict[str, Any] = Field(default_factory=dict)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None if moerge did not make it."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    try:
        _Manifest.model_validate(manifest)
    except ValidationError as error:
        place = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
        raise InputError(
            f"{path} is damaged at {place!r}, or was written by a newer moerge: merge again or update moerge", code="damaged-file"
        ) from None
    return manifest


def weights_digest(manifest: Mapping[str, Any]) -> str:
    """One digest of all tensors of a checkpoint, by which results are known to be of it, wherever it lies."""
    return combined_digest(manifest["tensors"])


def sealed(manifest: Mapping[str, Any]) -> bytes:
    """A manifest's file, with a digest of all that it says."""
    _Manifest.model_validate(manifest)
    said = {key: value for key, value in manifest.items() if key != _SEAL}
    return to_json({**said, _SEAL: _seal(said)})


def _seal(manifest: Mapping[str, Any]) -> str:
    said = {key: value for key, value in manifest.items() if key != _SEAL}
    return file_digest(json.dumps(said, sort_keys=True, default=str).encode())


def to_json(value: Mapping[str, Any]) -> bytes:
    """Readable JSON for a file."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # halves of characters, which JSON can only escape
        return (json.dumps(value, indent=2, default=str) + "\n").encode()


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Problems with the files beside the tensors, a sentence each."""
    problems = []
    if manifest.get(_SEAL, _seal(manifest)) != _seal(manifest):
        problems.append(f"{MANIFEST} was changed after the merge")
    for name, digest in manifest.get("files", {}).items():
        path = folder / name
        if not is_inside(name) or not path.is_file():
            problems.append(f"{name} is missing")
        elif file_digest(read_file(path)) != digest:
            problems.append(f"{name} was changed after the merge")
    return problems
