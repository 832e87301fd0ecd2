"""The manifest of a tuned checkpoint: digests by which damage is found, what it was made from, and what text it has seen."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from moerge.checkpoint.reader import ADAPTER_CONFIG, Checkpoint, open_folder
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.tensors.codec import decode
from moerge.tensors.digest import DEFINITION, TensorDigest, file_digest
from moerge.tensors.tensor import Tensor, windows
from moerge.tuning.tune_plan import TunePlan

MOST_DOCUMENTS = 100_000
"""Documents of a source whose hashes are kept, 20 bytes each; of longer ones none are, since some would look like all."""

_WINDOW = 1 << 20


def tuned_manifest(
    folder: Path, facts: Mapping[str, Any], plan: TunePlan, before: Mapping[str, Any], source: Checkpoint
) -> dict[str, Any]:
    """Return the content of `moerge.json`. `folder` is complete but for it, `before` the manifest of the model that was tuned.

    Recipe, experts and calibration texts are those of the merge that it began with; `tuning` has the sources, also those of
    tunings before.
    """
    alone = (folder / ADAPTER_CONFIG).exists()
    return {
        "format": 1,
        "versions": facts["versions"],
        "recipe": before.get("recipe") or {},
        "models": dict(facts["models"]),
        "experts": [] if alone else list(before.get("experts") or source.config.get("expert_names") or ()),
        "operations": [],
        **{key: before[key] for key in ("calibration", "statistics", "vocabulary") if key in before},
        "tuning": _texts(plan, before),
        "warnings": list(plan.warnings),
        "digest": DEFINITION,
        "tensors": {name: _digest(tensor) for name, tensor in open_folder(folder).tensors.items()},
        "files": {path.name: file_digest(path.read_bytes()) for path in sorted(folder.iterdir()) if _beside(path)},
    }


def _texts(plan: TunePlan, before: Mapping[str, Any]) -> dict[str, Any]:
    """Return the texts that were trained on: now, and when the model was tuned before, of which a name that comes again gets
    a number.
    """
    found = {name: _seen(plan, index) for index, name in enumerate(plan.mixture.names)}
    for name, entry in (before.get("tuning") or {}).items():
        if entry not in found.values():
            numbered = (f"{name}-{number}" for number in count(2))
            found[name if name not in found else next(other for other in numbered if other not in found)] = entry
    return found


def _seen(plan: TunePlan, index: int) -> dict[str, Any]:
    tokens, source = plan.tokens[index], plan.settings.data[plan.mixture.names[index]]
    hashes = [f"{value:016x}" for value in tokens.hashes_N.tolist()] if tokens.documents <= MOST_DOCUMENTS else None
    return {"location": source.path or source.hub, "digest": tokens.digest, "documents": hashes}


def _digest(tensor: Tensor) -> str:
    """InputError for a tensor of floats that are not all finite."""
    digest = TensorDigest()
    values_N = np.empty(min(_WINDOW, tensor.size), np.float32)
    for stored_N in windows(tensor, _WINDOW):
        if tensor.dtype.is_float and not decode(stored_N, tensor.dtype, values_N[: stored_N.size]):
            raise InputError(
                f"{tensor.name} has come to hold NaN or infinity, as {tensor.dtype.name} stores it: lower learning_rate, or "
                "choose another save_dtype"
            )
        digest.update(stored_N)
    return digest.digest()


def _beside(path: Path) -> bool:
    """Return whether a file goes into `files`: not the weights, their index, and the manifest itself."""
    return path.is_file() and path.suffix != ".safetensors" and not path.name.endswith(".index.json") and path.name != MANIFEST
