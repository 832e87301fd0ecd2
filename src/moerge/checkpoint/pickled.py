"""PyTorch's pickled weights without unpickling: a zip file whose data.pkl is interpreted by a few opcodes that run no code.

torch.save writes storages as uncompressed entries of the zip, and in data.pkl how tensors lie in them (torch/serialization.py).
Names of functions and types are looked up in a table of a dozen; whatever else a pickle asks for is refused. Nothing is imported.
"""

from __future__ import annotations

import math
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moerge.checkpoint.header import StoredTensor
from moerge.files import MOST_BYTES, FileState, SourceFile, open_file, unreadable
from moerge.tensors.dtypes import DTYPES

_STORAGES = {
    "torch FloatStorage": "F32",
    "torch HalfStorage": "F16",
    "torch BFloat16Storage": "BF16",
    "torch DoubleStorage": "F64",
    "torch LongStorage": "I64",
    "torch IntStorage": "I32",
    "torch ShortStorage": "I16",
    "torch CharStorage": "I8",
    "torch ByteStorage": "U8",
    "torch BoolStorage": "BOOL",
}
_DICT, _TENSOR, _PARAMETER = "collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
_KNOWN = {*_STORAGES, _DICT, _TENSOR, _PARAMETER}
_LOCAL_HEADER, _LOCAL_SIGNATURE = 30, b"PK\x03\x04"
_MOST_DIMENSIONS = 64


class UnreadablePickle(Exception):
    """A file that this reader does not take; the message is the rest of a sentence about it."""


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: str
    key: str
    size: int


@dataclass(frozen=True)
class _Layout:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]


_MARK = object()


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file that torch.save has written.

    Raises:
        UnreadablePickle: It is no such file, is damaged, or asks for more than tensors of numbers.
        InputError: The file cannot be opened.
    """
    try:
        with open_file(path) as file:
            state = FileState.of(file.fileno())
            return _Archive(file, SourceFile(path, state), state.size).tensors()
    except OSError as error:
        raise unreadable(path, error) from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, struct.error, NotImplementedError, RuntimeError):
        raise UnreadablePickle("is damaged, or older than torch 1.6") from None


class _Archive:
    """The zip file with its entries."""

    def __init__(self, file: BinaryIO, source: SourceFile, size: int) -> None:
        self._file, self._source, self._size = file, source, size
        self._zip = zipfile.ZipFile(file)
        entries = self._zip.infolist()
        self._entries = {entry.filename: entry for entry in entries}
        pickles = [name for name in self._entries if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1 or len(self._entries) != len(entries):
            raise UnreadablePickle("is not what torch.save writes")
        self._pickle, self._root = pickles[0], pickles[0].removesuffix("data.pkl")

    def tensors(self) -> dict[str, StoredTensor]:
        if self._entries[self._pickle].file_size > MOST_BYTES:
            raise UnreadablePickle("has a data.pkl that is larger than any model needs")
        order = self._root + "byteorder"
        if order in self._entries and self._zip.read(order) != b"little":
            raise UnreadablePickle("has its numbers in another byte order")
        layouts = layouts_of(self._zip.read(self._pickle))
        return {name: self._stored(name, layout) for name, layout in layouts.items()}

    def _stored(self, name: str, layout: _Layout) -> StoredTensor:
        storage, dtype = layout.storage, DTYPES[layout.storage.dtype]
        entry = self._entries.get(f"{self._root}data/{storage.key}")
        size = math.prod(layout.shape)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED or entry.file_size < storage.size * dtype.itemsize:
            raise UnreadablePickle(f"lacks numbers of tensor {name!r}")
        if layout.offset + size > storage.size:
            raise UnreadablePickle(f"has a tensor {name!r} that ends beyond its storage")
        start = self._data_start(entry) + layout.offset * dtype.itemsize
        if start + size * dtype.itemsize > self._size:
            raise UnreadablePickle(f"is truncated: tensor {name!r} ends beyond it")
        return StoredTensor(name, dtype, layout.shape, self._source, start)

    def _data_start(self, entry: zipfile.ZipInfo) -> int:
        """The place of an entry's first byte, behind a header whose length only the header itself says."""
        self._file.seek(entry.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != _LOCAL_SIGNATURE:
            raise UnreadablePickle("is damaged")
        return int(entry.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:])))


def layouts_of(pickled: bytes) -> dict[str, _Layout]:
    """The tensors by name that a pickle describes. UnreadablePickle for everything but a dict of them."""
    try:
        value = _Machine().run(pickled)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeDecodeError, OverflowError, MemoryError):
        raise UnreadablePickle("has a damaged data.pkl") from None
    if not isinstance(value, dict):
        raise UnreadablePickle("holds no dict of tensors")
    other = next((name for name, layout in value.items() if not isinstance(name, str) or not isinstance(layout, _Layout)), None)
    if other is not None:
        raise UnreadablePickle(f"holds {str(other)[:80]!r}, which is no tensor")
    return value


class _Machine:
    """An interpreter of the opcodes that torch.save uses: constants, tuples, dicts, and three functions known by name."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return self._stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("no end")

    def _step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name](argument))
        elif name in _TUPLES:
            count = _TUPLES[name]
            self._stack[-count:] = [tuple(self._stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name not in ("PROTO", "FRAME"):
            action: Callable[[Any], None] | None = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise UnreadablePickle(f"uses the opcode {name}")
            action(argument)

    def _since_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _global(self, argument: str) -> None:
        if argument not in _KNOWN:
            raise UnreadablePickle(f"asks for {argument.replace(' ', '.')[:80]}, which is no part of weights")
        self._stack.append(_Global(argument))

    def _stack_global(self, _: Any) -> None:
        module, name = self._stack[-2:]
        del self._stack[-2:]
        self._global(f"{module} {name}")

    def _setitem(self, _: Any) -> None:
        key, value = self._stack[-2:]
        del self._stack[-2:]
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        keys = values[::2]
        if not isinstance(target, dict) or len(values) % 2 or not all(isinstance(key, str) for key in keys):
            raise UnreadablePickle("holds no dict of tensors by name")
        target.update(zip(keys, values[1::2], strict=True))

    def _build(self, _: Any) -> None:
        """Attributes of a dict: torch writes versions of modules there, which nobody needs."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict):
            raise UnreadablePickle("sets attributes of something that is no dict")

    def _binpersid(self, _: Any) -> None:
        kind, dtype, key, _place, size = self._stack.pop()
        if kind != "storage" or not isinstance(dtype, _Global) or dtype.name not in _STORAGES:
            raise UnreadablePickle("has a storage of an unknown type")
        if not isinstance(key, str) or type(size) is not int or size < 0:
            raise ValueError(key)
        self._stack.append(_Storage(_STORAGES[dtype.name], key, size))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(_FUNCTIONS[function.name](*arguments))


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Layout:
    sizes = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(storage)
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise ValueError(sizes)
    expected = [math.prod(shape[dimension + 1 :]) for dimension in range(len(shape))]
    if math.prod(shape) and any(n > 1 and step != wanted for n, step, wanted in zip(shape, stride, expected, strict=True)):
        raise UnreadablePickle("has a tensor whose elements are not stored in order (a transposed view)")
    return _Layout(storage, offset, tuple(shape))


def _parameter(layout: Any, *_: Any) -> _Layout:
    if not isinstance(layout, _Layout):
        raise ValueError(layout)
    return layout


def _ordered(*arguments: Any) -> dict[str, Any]:
    if arguments:
        raise UnreadablePickle("fills a dict in an unknown way")
    return {}


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {_DICT: _ordered, _TENSOR: _tensor, _PARAMETER: _parameter}
_CONSTANTS: Mapping[str, Callable[[Any], Any]] = {
    "MARK": lambda _: _MARK,
    "EMPTY_DICT": lambda _: {},
    "EMPTY_TUPLE": lambda _: (),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"), lambda value: value
    ),
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
