"""GGUF files as models: tensors under the names that transformers has for them, read from where they lie in the file.

The gguf package reads the header and knows llama.cpp's names; transformers makes the config and the tokenizer. What llama.cpp's
converter does to tensors is undone: it interleaves the rows of Llama's queries and keys, and stacks the experts of a layer.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moerge.architecture.family import ExpectedTensor, expected_tensors
from moerge.architecture.registry import read_config
from moerge.checkpoint.header import StoredTensor
from moerge.checkpoint.reader import Checkpoint, read_json
from moerge.errors import InputError
from moerge.extras import require
from moerge.files import FileState, SourceFile, TemporaryFolder, open_file, unreadable
from moerge.quiet import without_warnings
from moerge.tensors.dtypes import DTYPES
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.ggml import BLOCK, BLOCK_BYTES, BlockTensor
from moerge.tensors.views.rows import RowsTensor
from moerge.tensors.views.span import SpanTensor

SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe")
"""Names in llama.cpp of the architectures that are read."""
_PLAIN = ("F32", "F16", "BF16")
_EXPERT = re.compile(r"(?<=\.experts)\.(\d+)(?=\.)")
_LOST = "rope_freqs.weight"
_SIZES = {"attention.key_length": "head_dim", "expert_feed_forward_length": "moe_intermediate_size"}
_NOT_OF_MODELS = ("unk_token_id", "_model_name_or_path")
"""Keys that transformers makes of a tokenizer and a title; no config of a checkpoint has them."""


@dataclass(frozen=True)
class GgufCheckpoint(Checkpoint):
    """A model in a GGUF file. `folder` is a temporary one with the config and the tokenizer that transformers makes of it."""

    file: SourceFile = field(kw_only=True)
    home: TemporaryFolder = field(kw_only=True, repr=False)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The file, and the folder of what transformers makes of it."""
        return (self.file.path, self.folder)

    @property
    def stored_as(self) -> str:
        """Its types of blocks."""
        kinds = {getattr(tensor, "kind", tensor.dtype.name) for tensor in self.tensors.values()}
        return f"GGUF {', '.join(sorted(kinds))}"


def open_gguf(path: Path, *, name: str = "", location: str = "") -> GgufCheckpoint:
    """Open a GGUF file as a model; no tensor is read.

    Raises:
        InputError: The file is damaged, of another version, or holds what moerge does not read.
    """
    label = f"{name}: " if name else ""
    require("gguf", f"{label}reading {path}")
    file = SourceFile(path, _checked(path, label))
    reader = _reader(path, label)
    _check_kind(reader, path, label)
    home = TemporaryFolder()
    with without_warnings():
        _write_companions(path, home.folder, label)
    config = _config(home.folder, reader)
    tensors = _Tensors(reader, file, label, config).by_name()
    scaled = any(tensor.name == _LOST for tensor in reader.tensors)
    warnings = (
        f"{label}{path} scales its rotary embedding by {_LOST!r}, which the config lacks: name another model with 'config'",
    )
    note = f"{label}blocks of {path.name} are read as float32: 'dtype' makes the result smaller"
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    notes = (note,) if kinds & BLOCK_BYTES.keys() else ()
    place = location or str(path)
    return GgufCheckpoint(
        name, place, home.folder, config, tensors, None, True, warnings if scaled else (), notes, file=file, home=home
    )


def _checked(path: Path, label: str) -> FileState:
    """The state of a file that begins as a GGUF of a version that is read."""
    try:
        with open_file(path) as opened:
            start, state = opened.read(8), FileState.of(opened.fileno())
    except OSError as error:
        raise unreadable(path, error) from None
    if len(start) < 8 or start[:4] != _MAGIC:
        raise InputError(f"{label}{path} is not a GGUF file: fetch or copy it again", code="damaged-file")
    version = struct.unpack("<I", start[4:])[0]
    if version not in _VERSIONS:
        raise InputError(
            f"{label}{path} is a GGUF file of version {version}, and moerge reads versions 2 and 3 in little-endian order: "
            "convert the model again with a current llama.cpp"
        )
    return state


def _reader(path: Path, label: str) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except Exception as error:  # of whatever kind its code runs into
        raise InputError(
            f"{label}{path} is truncated or damaged ({error}): fetch or copy it again", code="damaged-file"
        ) from None


def _check_kind(reader: Any, path: Path, label: str) -> None:
    """InputError for what is no single complete language model of an architecture that is read."""
    architecture = _text(reader, "general.architecture")
    if architecture not in _ARCHITECTURES or (architecture == "llama" and f"{architecture}.expert_count" in reader.fields):
        known = ", ".join(_ARCHITECTURES)
        raise InputError(
            f"{label}{path} holds a model of llama.cpp's architecture {architecture!r}, and moerge reads {known}, llama "
            "without experts: name the model that it was converted from"
        )
    split = reader.fields.get("split.count")
    if split is not None and int(split.contents()) > 1:
        raise InputError(f"{label}{path} is one part of several: join them with `llama-gguf-split --merge`, and name the result")


def _text(reader: Any, key: str) -> str:
    entry = reader.fields.get(key)
    return str(entry.contents()) if entry is not None else ""


def _write_companions(path: Path, folder: Path, label: str) -> None:
    """Write config.json and the tokenizer's files as transformers makes them of the file's header."""
    import transformers

    try:
        transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    except Exception as error:  # transformers, tokenizers and gguf have no common one
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{label}transformers cannot read the config or the tokenizer of {path}: {reason}") from None


def _config(folder: Path, reader: Any) -> dict[str, Any]:
    """The config that transformers has made, with the sizes that it leaves out for some architectures.

    Numbers are what they were before llama.cpp stored them in float32.
    """
    config = {key: _shortest(value) for key, value in read_json(folder / "config.json").items() if key not in _NOT_OF_MODELS}
    architecture = _text(reader, "general.architecture")
    sizes = {key: reader.fields.get(f"{architecture}.{name}") for name, key in _SIZES.items()}
    return {**config, **{key: int(entry.contents()) for key, entry in sizes.items() if entry is not None}}


def _shortest(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return {key: _shortest(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


class _Tensors:
    """The tensors of a file under transformers' names."""

    def __init__(self, reader: Any, file: SourceFile, label: str, config: Mapping[str, Any]) -> None:
        self._file, self._label, self._config = file, label, config
        self._stored = {tensor.name: tensor for tensor in reader.tensors}
        self._architecture, self._experts = _text(reader, "general.architecture"), 0

    def by_name(self) -> dict[str, Tensor]:
        """All tensors that the config calls for."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        family, config = read_config(self._config)
        assert family is not None, self._config
        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self._architecture)
        try:
            expected = expected_tensors(family, config)
        except ValueError as error:
            raise self._error(f"config: {error}") from None
        self._experts = 1 + max((tensor.expert for tensor in expected if tensor.expert is not None), default=-1)
        names = get_tensor_name_map(architecture, int(config["num_hidden_layers"]))
        return {
            tensor.name: self._tensor(tensor, names.get_name(_EXPERT.sub("", tensor.name), (".weight", ".bias")))
            for tensor in expected
        }

    def _tensor(self, expected: ExpectedTensor, name: str | None) -> Tensor:
        stored = self._stored.get(name or "")
        if stored is None:
            raise self._error(f"it has no tensor {name!r}, which is {expected.name!r} in transformers", "fetch or copy it again")
        expert = _EXPERT.search(expected.name)
        shape = tuple(int(size) for size in reversed(stored.shape))
        wanted = (self._experts, *expected.shape) if expert else expected.shape
        if shape != wanted:
            raise self._error(f"tensor {name!r} has shape {list(shape)}, expected {list(wanted)}")
        whole = self._whole(expected.name, stored, shape)
        if expert:
            return SpanTensor(expected.name, expected.shape, whole, int(expert[1]) * math.prod(expected.shape))
        heads = self._interleaved_heads(expected.role)
        return _deinterleaved(whole, heads) if heads else whole

    def _whole(self, name: str, stored: Any, shape: tuple[int, ...]) -> Tensor:
        kind, offset, size = stored.tensor_type.name, int(stored.data_offset), math.prod(shape)
        if kind in BLOCK_BYTES and not shape[-1] % BLOCK:
            nbytes = size // BLOCK * BLOCK_BYTES[kind]
            tensor: Tensor = BlockTensor(name, shape, kind, StoredTensor(name, DTYPES["U8"], (nbytes,), self._file, offset))
        elif kind in _PLAIN:
            tensor = StoredTensor(name, DTYPES[kind], shape, self._file, offset)
            nbytes = tensor.nbytes
        else:
            known = ", ".join((*_PLAIN, *BLOCK_BYTES))
            raise self._error(
                f"tensor {stored.name!r} is stored as {kind}, and moerge reads {known}", "take a file of one of these"
            )
        assert self._file.state is not None
        if offset + nbytes > self._file.state.size:
            raise self._error(f"it is truncated: tensor {stored.name!r} ends beyond the file", "fetch or copy it again")
        return tensor

    def _interleaved_heads(self, role: str) -> int:
        """The heads of a tensor whose rows llama.cpp's converter interleaves, 0 where it leaves them alone."""
        if self._architecture != "llama":
            return 0
        part = re.fullmatch(r"layers\.\d+\.attention\.([qk])", role)
        return int(self._config["num_attention_heads" if part[1] == "q" else "num_key_value_heads"]) if part else 0

    def _error(self, problem: str, advice: str = "convert the model again") -> InputError:
        return InputError(f"{self._label}{self._file.path}: {problem}: {advice}")


def _deinterleaved(tensor: Tensor, heads: int) -> Tensor:
    """The rows of each head in transformers' order: first halves of all pairs that rotate together, then their second halves."""
    rows = tensor.shape[0]
    order_V = np.arange(rows, dtype=np.int32).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return RowsTensor(tensor.name, (tensor,), (order_V,), np.zeros(rows, np.int16))
