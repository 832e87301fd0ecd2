"""Low-rank factors of a parameter that holds all experts of a layer, taken apart: a matrix for each expert.

Shapes: E experts, K the rank, I inputs, O outputs. peft (`ParamWrapper`) stores A as [E * K, I], expert after expert, and B as
[O, K * E], in which columns that follow one another are of different experts (`interleaved`). Other programs store B with the
columns of an expert side by side (`blocks`), either factor as [E, ...], or one A for all experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from moerge.files import SourceFile
from moerge.tensors.dtypes import F32, DType
from moerge.tensors.tensor import ArrayTensor, Sized, Tensor
from moerge.tensors.views.low_rank import Recent, read_float32

Packing = Literal["interleaved", "blocks"]


@dataclass(frozen=True)
class StackedFactor:
    """A factor of all experts; its `shape` is that of one of them: [K, I] for an A, [O, K] for a B, whose `packing` counts."""

    tensor: Tensor
    experts: int
    rank: int
    is_a: bool
    packing: Packing = "interleaved"
    recent: Recent[np.ndarray] = field(default_factory=lambda: Recent(2), repr=False, compare=False)

    @property
    def name(self) -> str:
        """The stored tensor's name."""
        return self.tensor.name

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of one expert's factor."""
        *_, rows, columns = self.tensor.shape
        return (self.rank, columns) if self.is_a else (rows, self.rank)

    def load(self) -> np.ndarray:
        """All experts' factors, [E, K, I] or [E, O, K], in float32."""
        values = read_float32(self.tensor)
        if values.ndim == 3 or values.shape == self.shape:
            return np.broadcast_to(values, (self.experts, *self.shape))
        if self.is_a:
            return values.reshape(self.experts, *self.shape)
        if self.packing == "blocks":
            return np.moveaxis(values.reshape(len(values), self.experts, self.rank), 1, 0)
        return np.moveaxis(values.reshape(len(values), self.rank, self.experts), 2, 0)

    def of(self, expert: int, rows: slice = slice(None)) -> ExpertFactor:
        """One expert's factor, or some rows of it."""
        count, columns = self.shape
        return ExpertFactor(self, expert, range(count)[rows], columns)


@dataclass(frozen=True)
class ExpertFactor(Sized):
    """A Tensor of float32: rows of one expert's factor."""

    stack: StackedFactor
    expert: int
    rows: range
    columns: int

    @property
    def name(self) -> str:
        """The stored tensor's name and the expert's number."""
        return f"{self.stack.name}[{self.expert}]"

    @property
    def dtype(self) -> DType:
        """float32."""
        return F32

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        return (len(self.rows), self.columns)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The file of all experts' factor."""
        return self.stack.tensor.files

    def open(self) -> ArrayTensor:
        """Load the factors of all experts, unless they were used a moment ago."""
        rows = slice(self.rows.start, self.rows.stop)
        values = self.stack.recent.of(self.stack)[self.expert, rows]
        return ArrayTensor(self.name, F32, self.shape, np.ascontiguousarray(values).reshape(-1))
