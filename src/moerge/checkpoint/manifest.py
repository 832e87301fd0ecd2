"""The manifest, `moerge.json`: what happened, and the digests by which damage is found later."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moerge.checkpoint.digest import combined_digest, file_digest
from moerge.checkpoint.reader import read_json
from moerge.checkpoint.staging import MANIFEST, Staging
from moerge.errors import InputError
from moerge.files import read_file
from moerge.planning.joined import SEPARATOR
from moerge.planning.plan import Plan

_FORMAT = 1


def build_manifest(plan: Plan, staging: Staging, files: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a finished merge. `files` are the digests of the files beside the tensors."""
    by_model: dict[str, dict[str, str]] = {model.name: {} for model in plan.models}
    for label, digest in staging.inputs.items():
        model, _, tensor = label.partition(":")
        for name in model.split(SEPARATOR):
            by_model.setdefault(name, {})[tensor] = digest
    return {
        "format": _FORMAT,
        "versions": {"moerge": version("moerge"), "python": platform.python_version()}
        | {package: version(package) for package in ("numpy", "numba", *_running(plan))},
        "recipe": plan.recipe.written,
        "models": {
            model.name: {
                "location": model.location,
                "revision": model.revision,
                "tensors_read": len(by_model[model.name]),
                "digest": combined_digest(by_model[model.name]),
            }
            for model in plan.models
        },
        "experts": list(plan.experts),
        "operations": list(plan.operations),
        "calibration": {
            texts.expert: {"location": texts.location, "digest": texts.digest, "documents": list(texts.hashes)}
            for texts in plan.calibration
        },
        "statistics": {
            used.model: {
                "file": str(used.statistics.path),
                "digest": combined_digest(by_model.get(used.label, {})),
                **used.statistics.facts.model_dump(include={"settings", "sequences", "tokens"}),
                "documents": list(used.statistics.facts.documents),
            }
            for used in plan.statistics
        },
        "vocabulary": dict(plan.vocabulary),
        "plan": plan.fingerprint,
        "warnings": list(plan.warnings),
        "nonfinite_inputs": staging.nonfinite,
        "digest": "xxh3-128 of the xxh3-128 of every 1048576 elements",
        "tensors": {output.name: staging.digests[output.name] for output in plan.outputs},
        "files": dict(files),
    }


def _running(plan: Plan) -> tuple[str, ...]:
    runs = any(fitting.fitter.runs_model for fitting in plan.fittings)
    return ("torch", "transformers") if runs else ()


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None if moerge did not make it."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    parts = {"versions": dict, "recipe": dict, "models": dict, "experts": list, "tensors": dict, "files": dict}
    if manifest.get("format") != _FORMAT or not all(isinstance(manifest.get(key), kind) for key, kind in parts.items()):
        raise InputError(f"{path} is damaged, or was written by a newer moerge: merge again or update moerge")
    return manifest


def weights_digest(manifest: Mapping[str, Any]) -> str:
    """One digest of all tensors of a checkpoint, by which results are known to be of it, wherever it lies."""
    return combined_digest(manifest["tensors"])


def to_json(value: Mapping[str, Any]) -> bytes:
    """Readable JSON for a file."""
    return (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode()


def damaged_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Problems with the files beside the tensors, a sentence each."""
    problems = []
    for name, digest in manifest.get("files", {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif file_digest(read_file(path)) != digest:
            problems.append(f"{name} was changed after the merge")
    return problems
