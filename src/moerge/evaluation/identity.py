"""The identity of a checkpoint: everything that an evaluation depends on, without reading tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moerge.architecture.sequence import BY_SEQUENCE
from moerge.checkpoint.manifest import read_manifest, weights_digest
from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.evaluation.records import Records
from moerge.extras import require
from moerge.files import read_file

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def identity(checkpoint: str) -> str:
    """Changes with a folder's configuration, tokenizer or weights (by size and time, or by the manifest's digests); a Hub id's is
    itself.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        return checkpoint
    tensors = tensors_digest(checkpoint)
    parts: list[Any] = []
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:  # of which the model card's digest changes with the card
            parts.append([path.name, tensors])
        elif path.suffix in _WEIGHTS and tensors is None:
            parts.append([path.name, path.stat().st_size, path.stat().st_mtime_ns])
        elif path.suffix in (".json", ".model", ".txt", ".py") and path.is_file():
            parts.append([path.name, Records.key(read_file(path).hex())])
    return Records.key(*parts)


def tensors_digest(checkpoint: str) -> str | None:
    """The digest of all tensors of a folder that moerge merged, by which `moerge report` knows whose figures these are."""
    folder = Path(checkpoint).expanduser()
    manifest = read_manifest(folder) if folder.is_dir() else None
    return weights_digest(manifest) if manifest else None


def routes_sequences(checkpoint: str) -> bool:
    """Return whether a checkpoint routes whole sequences, from its config.json. InputError where there is none."""
    require("models", "running a model", "transformers")
    from transformers import PretrainedConfig

    folder, place, revision = Path(checkpoint).expanduser(), checkpoint, ""
    if not folder.is_dir():
        if folder.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
            raise InputError(f"there is no checkpoint folder {checkpoint}: check the path", code="not-found")
        place, _, revision = checkpoint.partition("@")
    options = {"revision": revision} if revision else {}
    try:
        config, _ = PretrainedConfig.get_config_dict(str(folder) if folder.is_dir() else place, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the configuration of {checkpoint}: {' '.join(str(error).split())[:300]}") from None
    return bool(config.get("model_type") in BY_SEQUENCE)
