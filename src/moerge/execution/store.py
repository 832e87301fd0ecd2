"""Stores: the places where an execution writes its outputs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from moerge.operations.operations import Output


class Store(Protocol):
    """The place where outputs are written."""

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        """Elements `start` and following of an output, in its storage type."""
        ...

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """An output is complete; `inputs` are the digests of what was read for it, by "model:tensor".

        `nonfinite` are those of the inputs that hold NaN or infinity.
        """
        ...

    def finished(self, output: Output) -> bool:
        """Return whether an earlier, interrupted run completed this output."""
        ...


class NullStore:
    """The store of executions that only measure: nothing is written."""

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        """Not called."""
        raise AssertionError(output.name)

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """Not called."""
        raise AssertionError(output.name)

    def finished(self, output: Output) -> bool:
        """Not called."""
        raise AssertionError(output.name)


class MemoryStore:
    """The store of results that are used at once: whole tensors by name, flat and in their storage type."""

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        """Keep elements."""
        if output.name not in self.arrays:
            self.arrays.setdefault(output.name, np.empty(output.size, output.dtype.storage))
        self.arrays[output.name][start : start + data.size] = data

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """Nothing is left to do."""

    def finished(self, output: Output) -> bool:
        """No run came before."""
        return False

    def pop(self, output: Output) -> np.ndarray:
        """A tensor, which is forgotten here."""
        return self.arrays.pop(output.name, np.empty(0, output.dtype.storage))
