"""The safetensors header: 8 bytes of length, JSON, then the data (format described in the safetensors repository).

Reading checks everything that a damaged or hostile file can get wrong before a byte of data is used. The library's own
reader does not tell where a tensor's bytes lie, which block-wise reading needs; hence these few lines.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moerge.errors import InputError, MachineError
from moerge.files import FileState, SourceFile, open_file, unreadable
from moerge.system import RandomAccess
from moerge.tensors.dtypes import DTYPES, DType
from moerge.tensors.tensor import Sized

MAX_HEADER_BYTES = 100_000_000
_TOO_LARGE, _MOST_DIMENSIONS = 1 << 63, 64
"""The limit that the safetensors library sets too."""


class UnknownElements(InputError):
    """A tensor has an element type that moerge does not read, although others may."""


@dataclass(frozen=True)
class StoredTensor(Sized):
    """A tensor inside a safetensors file. `offset` is in bytes from the start of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: SourceFile
    offset: int

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The one file it lies in."""
        return (self.file,)

    def open(self) -> FileElements:
        """Open the file for reading this tensor's elements."""
        return FileElements(self)


class FileElements:
    """A tensor's elements, read from its file. Reading, unlike mapping, reports a failing disk instead of dying of it."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor
        try:
            self._file = RandomAccess(tensor.file.path)
        except OSError as error:  # its header could be read: this is no fault of the input
            raise MachineError(f"cannot read {tensor.file.path}: {error.strerror or error}") from None
        tensor.file.check(FileState.of(self._file.descriptor))

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Fill `out_N` with elements `start` and following, and return it."""
        view, offset = out_N.view(np.uint8).data, self._tensor.offset + start * self._tensor.dtype.itemsize
        while len(view):
            try:
                count = self._file.read_into(view, offset)
            except OSError as error:
                raise MachineError(f"reading {self._tensor.file.path} failed: {error.strerror or error}") from None
            if count == 0:
                raise self._tensor.file.changed("cut short")
            view, offset = view[count:], offset + count
        return out_N


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises InputError if the file is missing, truncated, not safetensors, or its header contradicts itself.
    """
    try:
        with open_file(path) as file:
            state = FileState.of(file.fileno())
            file_size = state.size
            start = file.read(8)
            if len(start) < 8:
                raise InputError(
                    f"{path} is truncated ({file_size} bytes, not even a header): fetch or copy it again", code="damaged-file"
                )
            length = struct.unpack("<Q", start)[0]
            if length > MAX_HEADER_BYTES:
                raise InputError(
                    f"{path} is not a safetensors file: its header would be {length:,} bytes (limit {MAX_HEADER_BYTES:,})"
                )
            if 8 + length > file_size:
                raise InputError(
                    f"{path} is truncated inside its header ({file_size:,} bytes): fetch or copy it again", code="damaged-file"
                )
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    source = SourceFile(path, state)
    tensors = [stored_tensor(source, name, entry, 8 + length) for name, entry in _parse(path, raw).items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(path, tensors, 8 + length, file_size)
    return {tensor.name: tensor for tensor in tensors}


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file that `read_header` accepts."""
    try:
        with open_file(path) as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except OSError as error:
        raise unreadable(path, error) from None
    found = header.get("__metadata__")
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name appears twice")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the header of {path} is damaged ({error}): fetch or copy the file again", code="damaged-file"
        ) from None
    header.pop("__metadata__", None)
    return header


def stored_tensor(file: SourceFile, name: str, entry: Any, data_start: int) -> StoredTensor:
    """One entry of a header as a tensor; InputError if it contradicts itself."""
    where = f"tensor {name!r} in {file.path}"
    try:
        dtype_name, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise InputError(f"{where} has a damaged header entry: fetch or copy the file again", code="damaged-file") from None
    if (
        not isinstance(shape, list)
        or len(shape) > _MOST_DIMENSIONS
        or not all(type(n) is int and 0 <= n < _TOO_LARGE for n in [*shape, begin, end])
    ):
        raise InputError(f"{where} has a damaged header entry: fetch or copy the file again", code="damaged-file")
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise UnknownElements(f"{where} has the element type {dtype_name!r}, which moerge does not read")
    tensor = StoredTensor(name, DTYPES[dtype_name], tuple(shape), file, data_start + begin)
    if tensor.nbytes != end - begin:
        raise InputError(
            f"{where} lies about its size: shape {shape} of {dtype_name} needs {tensor.nbytes:,} bytes, "
            f"the header gives it {end - begin:,}; the file is damaged",
            code="damaged-file",
        )
    return tensor


def _check_layout(path: Path, tensors: Sequence[StoredTensor], data_start: int, file_size: int) -> None:
    position = data_start
    for tensor in tensors:
        if tensor.offset < position:
            raise InputError(f"tensor {tensor.name!r} in {path} overlaps another one; the file is damaged", code="damaged-file")
        if tensor.offset > position:
            raise InputError(f"there is a hole before tensor {tensor.name!r} in {path}; the file is damaged", code="damaged-file")
        position = tensor.offset + tensor.nbytes
    if position > file_size:
        raise InputError(
            f"{path} is truncated: its header promises {position:,} bytes, the file has {file_size:,}; fetch or copy it again",
            code="damaged-file",
        )
    if position < file_size:
        raise InputError(
            f"{path} has {file_size - position:,} bytes that no tensor claims; the file is damaged", code="damaged-file"
        )


def build_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The header bytes for tensors stored in this order, and each tensor's offset in bytes from the file's start."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    position, starts = 0, {}
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype.name, "shape": list(shape), "data_offsets": [position, end]}
        starts[name], position = position, end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + start for name, start in starts.items()}
