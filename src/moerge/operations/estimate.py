"""Estimates of the memory that tensors take which are merged in one region."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moerge.operations.operations import Merge, Output
from moerge.tensors.dtypes import F32
from moerge.tensors.streams import BLOCK


def region_memory(outputs: Sequence[Output], threads: int) -> int:
    """Bytes that merging by rows and by whole tensors takes beside the executor's own buffers."""
    rows = max((region_bytes(output) for output in outputs if granularity(output) == "rows"), default=0)
    return threads * rows + largest(outputs)


def largest(outputs: Sequence[Output]) -> int:
    """Bytes that the largest tensor takes that is merged whole; 0 where none is."""
    return max((region_bytes(output) for output in outputs if granularity(output) == "tensor"), default=0)


def region_bytes(output: Output) -> int:
    """Bytes of float32 that merging one region of an output takes: experts, base, result, statistics, the method's own."""
    operation = output.operation
    assert isinstance(operation, Merge)
    experts, size = len(operation.experts), region_size(output)
    if operation.method.unit == "tensor":
        extras = sum(extra.tensor.size for extra in operation.extras if extra is not None)
        return ((experts + 2) * size + extras) * F32.itemsize + operation.method.scratch_bytes(output.shape, experts)
    return (experts + 2 + len(operation.extras) + _SCRATCH_OF_ROWS) * size * F32.itemsize


def granularity(output: Output) -> str:
    """Return what an output is merged by: blocks of elements, rows, or the whole tensor."""
    return output.operation.method.unit if isinstance(output.operation, Merge) else "block"


def columns_of(shape: tuple[int, ...]) -> int:
    """The length of a row: of the last axis; a vector is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)


def region_size(output: Output) -> int:
    """Elements that are merged at a time: as many rows as fit into a block, at least one; or the whole tensor."""
    if granularity(output) == "tensor":
        return output.size
    columns = columns_of(output.shape)
    return min(output.size, max(1, BLOCK // max(1, columns)) * columns)


_SCRATCH_OF_ROWS = 4
"""Copies of its rows that a method may make while it ranks them."""
