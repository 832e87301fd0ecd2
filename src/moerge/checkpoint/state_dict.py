"""Tensors without a transformers model around them: a safetensors file, or a folder of a diffusion model, an encoder, a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moerge.checkpoint.header import StoredTensor, read_header
from moerge.checkpoint.locate import locate
from moerge.checkpoint.reader import ADAPTER_CONFIG, WEIGHTS, Checkpoint, read_json, read_shards
from moerge.errors import InputError

SUFFIX = ".safetensors"
_DIFFUSERS = "diffusion_pytorch_model"
_INDEX = ".index.json"


def open_model(
    location: str, *, name: str = "", relative_to: Path | None = None, weights: bool = True, commit: str | None = None
) -> Checkpoint:
    """Open a model as `locate` does, or tensors without one: a file, or a folder in which there is no transformers model.

    Raises InputError if there is neither, or if it is not clear which files count.
    """
    try:
        path = (relative_to or Path()) / Path(location).expanduser()
        bare = is_state_dict(path)
    except (OSError, RuntimeError):
        bare = False
    if bare:
        return open_state_dict(path, name=name, location=location)
    return locate(location, name=name, relative_to=relative_to, weights=weights, commit=commit)


def is_state_dict(path: Path) -> bool:
    """Return whether this is a safetensors file, or a folder with some that hold no transformers model."""
    if path.is_file():
        return path.suffix == SUFFIX
    if not path.is_dir() or (path / ADAPTER_CONFIG).exists() or any(path.glob(f"*/{ADAPTER_CONFIG}")):
        return False
    if (path / "config.json").exists():
        return bool(_of_stem(path, _DIFFUSERS)) and not _of_stem(path, Path(WEIGHTS).stem)
    return any(path.glob(f"*{SUFFIX}"))


def open_state_dict(path: Path, *, name: str = "", location: str = "") -> Checkpoint:
    """The tensors of a file or folder; its config is that of a folder's config.json, or empty.

    What lies beside a file is not the file's: its `folder` is the file itself.
    """
    config: dict[str, Any] = read_json(path / "config.json") if (path / "config.json").exists() else {}
    tensors = _tensors(path, name)
    if not tensors:
        raise InputError(f"{_label(name)}{path} holds no tensors: fetch or copy it again")
    return Checkpoint(name, location or str(path), path, config, tensors)


def stem_of(checkpoint: Checkpoint) -> str:
    """The beginning of the names of a checkpoint's files, which programs other than transformers look for."""
    names = {file.path.name for file in checkpoint.files}
    return _DIFFUSERS if names and all(name.startswith(_DIFFUSERS) for name in names) else Path(WEIGHTS).stem


def _tensors(path: Path, name: str) -> dict[str, StoredTensor]:
    if path.is_file():
        return read_header(path)
    for stem in (Path(WEIGHTS).stem, _DIFFUSERS):
        files = _of_stem(path, stem)
        if len(files) > 1:
            raise InputError(f"{_label(name)}{path} has both {files[0].name} and {files[1].name}: remove the stale one")
        if files:
            return read_header(files[0]) if files[0].suffix == SUFFIX else read_shards(path, files[0])
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        listed = ", ".join(file.name for file in files[:5])
        raise InputError(f"{_label(name)}{path} has {len(files)} safetensors files and no index ({listed}): name one of them")
    return read_header(files[0])


def _of_stem(folder: Path, stem: str) -> list[Path]:
    """The file of this name, and the index; normally one of the two."""
    return [path for path in (folder / f"{stem}{SUFFIX}", folder / f"{stem}{SUFFIX}{_INDEX}") if path.exists()]


def _label(name: str) -> str:
    return f"{name}: " if name else ""
