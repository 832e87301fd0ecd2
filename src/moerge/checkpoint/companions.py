"""The files beside a model's weights: which of them belong to a result, and which it lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from moerge.errors import InputError, MachineError
from moerge.files import read_file, unreadable

_PROCESSORS = ("*processor*config*.json", "config_sentence_transformers.json", "sentence_*_config.json", "modules.json")
"""What a model of several modalities, or one that embeds texts, is used with."""
_MODULES = "modules.json"
_STALE = (
    *("config.json", "adapter_config.json", "moerge.json", "tune.json", "metrics.jsonl", "quantize_config.json", "params.json"),
    *("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.gguf", "*.npz"),
    *("*.index.json", "*.md", "*.txt.gz", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf", "*.mp4", "*.html"),
    *("license*", "notice*", "use_policy*", ".*", "*/.*", "*.log", "*.csv", "*.lock", "__pycache__/*"),
    *("onnx/*", "openvino/*", "original/*", "coreml/*", "checkpoint-*", "global_step*", "runs/*", "wandb/*"),
    "router_statistics/*",
    *("trainer_*", "training_*", "*_results.json", "optimizer*", "scheduler*", "rng_state*", "latest", "zero_to_fp32.py"),
)
"""Weights, what describes other weights than the result's, descriptions, and what training leaves: nobody misses these."""
_RELATIVE_IMPORT = re.compile(r"^\s*(?:from|import)\s+\.(\w+)", re.MULTILINE)


def read_companions(folder: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """The files of a model's folder whose names match, by name.

    Raises InputError for a link that leaves the folder: its content would go into the result, which may be published.
    """
    names = dict.fromkeys(name for pattern in patterns for name in _matching(folder, pattern))
    return {name: _read(folder, name) for name in names}


def _matching(folder: Path, pattern: str) -> Iterator[str]:
    if not any(sign in pattern for sign in "*?["):
        yield from [pattern] if (folder / pattern).is_file() else []
        return
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.glob(pattern) if path.is_file())


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        real, home = path.resolve(strict=True), folder.resolve()
        # in the Hub's cache, files are links from snapshots/COMMIT to blobs
        allowed = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
        if not any(place in real.parents for place in allowed):
            raise InputError(f"{path} is a link to {real}, outside of the model's folder: put the file itself there")
        return read_file(real)
    except MachineError:
        raise
    except OSError as error:
        raise unreadable(path, error) from None


def is_inside(name: str) -> bool:
    """Return whether this is the name of a file in a folder, or in a folder of that."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and name == "/".join(parts)
        and "\\" not in name
        and "\0" not in name
        and ".." not in parts
        and "/" not in parts
    )


@dataclass(frozen=True)
class Companions:
    """Files that go with a model; `auto_map` of config.json, where that names code among them; and the names of what does not."""

    files: Mapping[str, bytes]
    auto_map: Mapping[str, Any] | None
    left_out: tuple[str, ...]

    @property
    def code(self) -> list[str]:
        """The names of programs among the files."""
        return [name for name in self.files if name.endswith(".py")]


def model_companions(folder: Path, config: Mapping[str, Any], *, others: Sequence[str]) -> Companions:
    """Return the files that a model with this config has beside its weights and those that match `others`."""
    files = read_companions(folder, _PROCESSORS)
    for module in _sentence_modules(files):
        files |= read_companions(folder, [f"{module}/*.json", f"{module}/*.safetensors", f"{module}/*.txt"])
    maps = [config.get("auto_map"), *(_object(files[name]).get("auto_map") for name in files if name.endswith(".json"))]
    files |= code_of(folder, maps)
    auto_map = config.get("auto_map")
    complete = isinstance(auto_map, Mapping) and all(f"{module}.py" in files for module in local_modules([auto_map]))
    known = (*others, *_STALE)
    there = (name for name in _everything(folder, _sentence_modules(files)) if name not in files)
    left_out = [name for name in there if not any(fnmatchcase(name.lower(), pattern) for pattern in known)]
    return Companions(files, auto_map if complete else None, tuple(left_out))


def code_of(folder: Path, maps: Iterable[Any]) -> dict[str, bytes]:
    """The modules in a folder that these `auto_map`s name, and those that they import from beside them."""
    found: dict[str, bytes] = {}
    waiting = list(local_modules(maps))
    while waiting:
        name = f"{waiting.pop()}.py"
        if name not in found and (folder / name).is_file():
            found[name] = _read(folder, name)
            waiting += _RELATIVE_IMPORT.findall(found[name].decode("utf-8", "replace"))
    return dict(sorted(found.items()))


def local_modules(maps: Iterable[Any]) -> dict[str, None]:
    """The modules that `auto_map`s name, but for those of other repositories (`owner/name--module.Class`)."""
    values = [value for mapping in maps if isinstance(mapping, Mapping) for value in mapping.values()]
    classes = [name for value in values for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
    return dict.fromkeys(name.partition(".")[0] for name in classes if "--" not in name and is_inside(name))


def _sentence_modules(files: Mapping[str, bytes]) -> list[str]:
    """The folders of sentence-transformers' modules."""
    try:
        modules = json.loads(files.get(_MODULES, b"[]"))
    except ValueError:
        return []
    paths = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [path for path in paths if isinstance(path, str) and is_inside(path)]


def _object(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _everything(folder: Path, opened: Sequence[str]) -> list[str]:
    """Files and folders in a folder, and what is in those that are `opened`."""
    names = [path.name if path.is_file() else f"{path.name}/" for path in (folder.iterdir() if folder.is_dir() else ())]
    inner = [f"{module}/{path.name}" for module in opened for path in (folder / module).glob("*")]
    return sorted([name for name in names if name.rstrip("/") not in opened] + inner)
