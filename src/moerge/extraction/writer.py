"""Writing an adapter folder: tensors one after the other, into a hidden folder that gets its name at the end."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from types import TracebackType

import numpy as np

from moerge.checkpoint.header import build_header
from moerge.checkpoint.reader import ADAPTER_WEIGHTS
from moerge.checkpoint.workspace import Workspace
from moerge.errors import InputError, MachineError
from moerge.tensors.codec import all_finite, decode, encode
from moerge.tensors.dtypes import DType

Shape = tuple[int, ...]
_KIND = "partial-"


class AdapterWriter:
    """A context manager. `largest` are the tensors to come in their order, no smaller than they will be."""

    def __init__(self, target: Path, largest: Sequence[tuple[str, Shape]], dtype: DType) -> None:
        self.target, self.dtype = target, dtype
        # smaller tensors need no longer numbers, so what is left of this room is filled with spaces, as the format allows
        header, _ = build_header([(name, dtype, shape) for name, shape in largest], {"format": "pt"})
        self._room = len(header)
        self._written: list[tuple[str, DType, Shape]] = []

    def __enter__(self) -> AdapterWriter:
        with _writing(self.target):
            _sweep(self.target)
            self._workspace = _workspace(self.target, f"{_KIND}{token_hex(4)}")
            self._workspace.acquire()
            self.folder = self._workspace.root / "adapter"
            self.folder.mkdir()
            self._file = open(self.folder / ADAPTER_WEIGHTS, "wb")
            self._file.seek(self._room)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._workspace.discard()
        self._workspace.close()

    def add(self, name: str, values: np.ndarray) -> np.ndarray:
        """Store a tensor; its values as they are stored, in float32."""
        stored_N = np.empty(values.size, self.dtype.storage)
        encode(np.ascontiguousarray(values, np.float32).reshape(-1), self.dtype, stored_N)
        if not all_finite(stored_N, self.dtype):
            raise InputError(f"tensor {name!r} is too large for {self.dtype.torch_name}: choose another --dtype")
        with _writing(self.target):
            self._file.write(stored_N.data)
        self._written.append((name, self.dtype, values.shape))
        rounded_N = np.empty(values.size, np.float32)
        decode(stored_N, self.dtype, rounded_N)
        return rounded_N.reshape(values.shape)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shapes of the tensors stored so far."""
        return {name: shape for name, _, shape in self._written}

    @property
    def parameters(self) -> int:
        """Elements stored so far."""
        return sum(int(np.prod(shape)) for _, _, shape in self._written)

    def publish(self, files: Mapping[str, bytes]) -> None:
        """Complete the file, add the others, make all of it durable and give the folder its name."""
        header, _ = build_header(self._written, {"format": "pt"})
        length = self._room - 8
        assert len(header) <= self._room
        with _writing(self.target):
            self._file.seek(0)
            self._file.write(length.to_bytes(8, "little") + header[8:].ljust(length))
            self._file.close()
            self._workspace.publish(self.folder, files, replace=False)


def _workspace(target: Path, kind: str) -> Workspace:
    return Workspace(target, kind, lock="lock")


def _sweep(target: Path) -> None:
    """Remove what processes that were killed have left: nothing of it can be used."""
    prefix = f".{target.name}.moerge-"
    for folder in target.parent.glob(f"{glob.escape(prefix + _KIND)}????????"):
        _workspace(target, folder.name.removeprefix(prefix)).clear()


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"cannot write {target}: {error.strerror or error}: nothing of it is left, run it again") from None
