"""A checkpoint folder as its config and its tensors' whereabouts; no tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from moerge.checkpoint.header import StoredTensor, read_header
from moerge.checkpoint.pickled import UnreadablePickle, read_pickled
from moerge.errors import InputError
from moerge.files import LONGEST_NAME, SourceFile, read_file
from moerge.tensors.tensor import Tensor
from moerge.tensors.threads import default_threads

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_ADAPTER_INDEX = "adapter_model.safetensors.index.json"
_CONVERT = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "M.from_pretrained({source!r}, dtype='auto').save_pretrained({target!r}); "
    "T.from_pretrained({source!r}).save_pretrained({target!r})"
)
_CONVERT_ADAPTER = (
    "import torch, safetensors.torch as s; w = torch.load({source!r}, map_location='cpu', weights_only=True); "
    "s.save_file({{k: v.contiguous() for k, v in w.items()}}, {target!r})"
)
_PICKLED_ADAPTER = "adapter_model.bin"
_PICKLED_WEIGHTS, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_PICKLED = (_PICKLED_WEIGHTS, _PICKLED_INDEX, "consolidated.00.pth")


@dataclass(frozen=True)
class Checkpoint:
    """A source model. `name` is how the recipe calls it, `location` what the recipe wrote, `revision` a Hub commit.

    `complete` is False while a Hub model's weights have not been downloaded: its tensors then have no bytes to open. An adapter
    (see `is_adapter`) has its own settings as `config` and its own few tensors. `warnings` are what its user should know, `notes`
    what may be of interest.
    """

    name: str
    location: str
    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    revision: str | None = None
    complete: bool = True
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the folders of its files."""
        return (self.folder,)

    @property
    def stored_as(self) -> str:
        """Its element types."""
        return ", ".join(sorted({tensor.dtype.name for tensor in self.tensors.values()}))

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Its tensors, or those that it changes."""
        return self.tensors

    @property
    def working_bytes(self) -> int:
        """Memory that reading its tensors takes beside the blocks that are read, by all threads."""
        return max((getattr(tensor, "working_bytes", 0) for tensor in self.tensors.values()), default=0) * default_threads()

    @property
    def model_type(self) -> str:
        """config.json's `model_type`, or "" where it has none."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """The files that its tensors are read from, as they were when their headers were read."""
        return tuple(sorted({file for tensor in self.tensors.values() for file in tensor.files}))

    @property
    def stamps(self) -> tuple[tuple[str, int, int], ...]:
        """Name, size and time of each of them that is on this machine."""
        return tuple(file.stamp for file in self.files if file.state)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Return a key for everything that its tensors depend on, as far as that is known without reading them."""
        return (self.name, self.location, self.revision, tuple(file.identity for file in self.files if file.state))

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """The models in files that it is made of."""
        return (self,)

    @property
    def commits(self) -> dict[str, str | None]:
        """The Hub commit that it stems from, by its name."""
        return {self.name: self.revision}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def open_folder(folder: Path, *, name: str = "", location: str = "") -> Checkpoint:
    """Read the config and the headers in `folder`.

    Raises InputError if it is not a complete safetensors checkpoint.
    """
    if folder.is_file():
        raise InputError(f"{_label(name)}{folder} is a file: name the checkpoint's folder instead")
    if not folder.is_dir():
        raise InputError(f"{_label(name)}there is no folder {folder}: check the path", code="not-found")
    if not any((folder / file).exists() for file in ("config.json", ADAPTER_CONFIG)) and (inner := _adapter_inside(folder, name)):
        return open_folder(inner, name=name, location=location or str(folder))
    if (folder / ADAPTER_CONFIG).is_file() and not _has_model(folder, name):
        tensors = _read_adapter(folder, name)
        return Checkpoint(name, location or str(folder), folder, read_json(folder / ADAPTER_CONFIG), tensors)
    config = read_config(folder)
    tensors, notes = _read_tensors(folder, name)
    return Checkpoint(name, location or str(folder), folder, config, tensors, notes=tuple(f"{_label(name)}{n}" for n in notes))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; InputError where it garbles what everything else relies on."""
    path = folder / "config.json"
    config = read_json(path)
    named, kind = config.get("architectures"), config.get("model_type")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise InputError(f"{path}: architectures should be a list of names, not {named!r}: correct it")
    if kind is not None and not isinstance(kind, str):
        raise InputError(f"{path}: model_type should be a name, not {kind!r}: correct it")
    return config


def is_adapter(checkpoint: Checkpoint) -> bool:
    """Return whether these are the tensors of an adapter, which is no model without its base."""
    return "peft_type" in checkpoint.config and "model_type" not in checkpoint.config


def _has_model(folder: Path, name: str) -> bool:
    """Return whether a folder with an adapter's settings is a model all the same: some keep those of one that was merged into
    it.
    """
    model = next((file for file in (WEIGHTS, INDEX) if (folder / file).exists()), None)
    if model and (folder / ADAPTER_WEIGHTS).exists():
        raise InputError(
            f"{_label(name)}{folder} has both {model} and {ADAPTER_WEIGHTS}, so it is unclear whether it is a model or an "
            "adapter: move one of them to a folder of its own"
        )
    return model is not None


def _adapter_inside(folder: Path, name: str) -> Path | None:
    """The only adapter in the folders of a folder, where peft puts one with a name of its own. InputError for several."""
    inner = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}"))
    if len(inner) > 1:
        listed = ", ".join(path.name for path in inner[:5])
        raise InputError(f"{_label(name)}{folder} holds {len(inner)} adapters ({listed}): name the folder of one of them")
    return inner[0] if inner else None


def _read_adapter(folder: Path, name: str) -> dict[str, StoredTensor]:
    if (folder / _ADAPTER_INDEX).exists() and not (folder / ADAPTER_WEIGHTS).exists():
        return _read_shards(folder, folder / _ADAPTER_INDEX)[0]
    if (folder / ADAPTER_WEIGHTS).exists():
        tensors = read_header(folder / ADAPTER_WEIGHTS)
        if not tensors:
            raise InputError(f"{_label(name)}{folder / ADAPTER_WEIGHTS} holds no tensors: fetch or copy it again")
        return tensors
    if (folder / _PICKLED_ADAPTER).exists():
        try:
            return read_pickled(folder / _PICKLED_ADAPTER)
        except UnreadablePickle as error:
            _refuse_pickled_adapter(folder, name, f" (it {error})")
    raise InputError(f"{_label(name)}{folder} has {ADAPTER_CONFIG}, but no {ADAPTER_WEIGHTS}: fetch or copy it again")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; InputError names the file if it is missing or is something else."""
    try:
        value = json.loads(read_file(path).decode("utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise InputError(f"{path} is missing: a checkpoint folder needs it", code="not-found") from None
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path} as JSON: {error}", code="damaged-file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} should hold a JSON object, not a {type(value).__name__}")
    return value


def _no_number(text: str) -> float:
    """Infinity, which some models have as a limit and transformers reads."""
    if text == "NaN":
        raise ValueError(f"{text} is no number of JSON's")
    return float(text)


def _label(name: str) -> str:
    return f"{name}: " if name else ""


def _read_tensors(folder: Path, name: str) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors, and notes on files that do not count. Of several layouts the first counts, as in transformers."""
    single, index = folder / WEIGHTS, folder / INDEX
    pickled = next((folder / file for file in (_PICKLED_WEIGHTS, _PICKLED_INDEX) if (folder / file).exists()), None)
    if single.exists() or index.exists():
        tensors, notes = _read_layout(single if single.exists() else index, read_header)
        both = single.exists() and index.exists()
        notes += [f"{folder} has both {WEIGHTS} and {INDEX}: the first counts, as in transformers"] if both else []
    elif pickled is not None:
        try:
            tensors, notes = _read_layout(pickled, read_pickled)
        except UnreadablePickle as error:
            _refuse_pickles(folder, name, f" (it {error})")
    else:
        _refuse_pickles(folder, name)
        _refuse_missing(folder, name)
    if not tensors:
        raise InputError(f"{_label(name)}{folder} holds no tensors: fetch or copy it again")
    return tensors, notes


def _read_layout(file: Path, read: Callable[[Path], dict[str, StoredTensor]]) -> tuple[dict[str, StoredTensor], list[str]]:
    return _read_shards(file.parent, file, read) if file.suffix == ".json" else (read(file), [])


def _refuse_missing(folder: Path, name: str) -> NoReturn:
    single, index = folder / WEIGHTS, folder / INDEX
    dangling = next((path for path in (single, index) if path.is_symlink()), None)
    if dangling:
        raise InputError(f"{_label(name)}{dangling} is a link to {os.readlink(dangling)}, which is gone: fetch the model again")
    raise InputError(f"{_label(name)}{folder} has neither {WEIGHTS} nor {INDEX}: it is not a safetensors checkpoint")


def read_index(index: Path) -> dict[str, str]:
    """The shard of each tensor from an index file; InputError if it names anything but files beside it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise InputError(f"{index} has no usable 'weight_map': fetch or copy it again")
    for shard in sorted(set(weight_map.values())):
        if shard != Path(shard).name or shard in ("", ".", "..") or "\\" in shard or "\0" in shard or len(shard) > LONGEST_NAME:
            raise InputError(f"{index} names {shard!r}, which is not a file in its own folder: refusing to read it")
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """A folder's safetensors files, which are all there; none where it has no weights of that kind."""
    if (folder / INDEX).exists():
        return _shards(folder, read_index(folder / INDEX))
    return [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []


def check_files(folder: Path) -> None:
    """InputError where a folder's weights are pickles, or where its index names files elsewhere. No tensor is looked at."""
    if (folder / INDEX).exists():
        read_index(folder / INDEX)
    elif not any(folder.glob("*.safetensors")):
        _refuse_pickles(folder, "")
        _refuse_pickled_adapter(folder, "")


def read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    """The tensors of several safetensors files; InputError where one that the index names is missing or lies twice."""
    return _read_shards(folder, index)[0]


def _read_shards(
    folder: Path, index: Path, read: Callable[[Path], dict[str, StoredTensor]] = read_header
) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of all shards that an index names, wherever it has them, as transformers reads them; and a note on that."""
    weight_map = read_index(index)
    tensors: dict[str, StoredTensor] = {}
    for file in _shards(folder, weight_map, index.name):
        stored = read(file)
        twice = next((name for name in stored if name in tensors), None)
        if twice is not None:
            raise InputError(
                f"tensor {twice!r} lies in {tensors[twice].file.path} and in {file}: "
                "the folder mixes shards of different checkpoints"
            )
        tensors |= stored
    elsewhere = [tensor.name for tensor in tensors.values() if weight_map.get(tensor.name) != tensor.file.name]
    stale = f"{index} is stale: it has {len(elsewhere)} tensors elsewhere or not at all, such as {next(iter(elsewhere), '')!r}"
    missing = sorted(set(weight_map) - set(tensors))
    if missing:
        raise InputError(f"tensor {missing[0]!r} is listed in {index} but is not in {folder / weight_map[missing[0]]}")
    return tensors, [stale] if elsewhere else []


def _shards(folder: Path, weight_map: Mapping[str, str], index: str = INDEX) -> list[Path]:
    files = [folder / shard for shard in sorted(set(weight_map.values()))]
    absent = next((file for file in files if not file.exists()), None)
    if absent:
        raise InputError(f"{folder / index} names {absent.name}, which is missing: fetch or copy it again")
    return files


def _refuse_pickles(folder: Path, name: str, reason: str = "") -> None:
    found = next((file for file in _PICKLED if (folder / file).exists()), None)
    if found:
        raise InputError(
            f"{_label(name)}{folder} holds {found}, a pickle, which moerge does not load{reason}; convert the checkpoint with: "
            + f'python -c "{_CONVERT.format(source=str(folder), target=f"{folder}-safetensors")}"'
        )


def _refuse_pickled_adapter(folder: Path, name: str, reason: str = "") -> None:
    if (folder / _PICKLED_ADAPTER).exists():
        source, target = str(folder / _PICKLED_ADAPTER), str(folder / ADAPTER_WEIGHTS)
        raise InputError(
            f"{_label(name)}{folder} holds {_PICKLED_ADAPTER}, a pickle, which moerge does not load{reason}; convert it with: "
            + f'python -c "{_CONVERT_ADAPTER.format(source=source, target=target)}"'
        )
