"""Merging tensors row by row or whole, for methods that need more than a run of elements.

Each tensor is one task, read and written in order; tensors run side by side. Complete rows are merged a few at a time. Whole
tensors wait for memory: together, those at work never hold more than the largest one needs alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from moerge.execution.store import Store
from moerge.methods.method import Block
from moerge.operations.estimate import columns_of, granularity, region_bytes, region_size
from moerge.operations.operations import Merge, Output
from moerge.tensors.codec import encode
from moerge.tensors.digest import TensorDigest
from moerge.tensors.dtypes import DType
from moerge.tensors.source import Source
from moerge.tensors.streams import WINDOW, Stream


class Run(Protocol):
    """The parts of an execution that a merge by regions uses."""

    @property
    def store(self) -> Store:
        """The place for encoded elements."""

    @property
    def advance(self) -> Callable[[int], None]:
        """A callback for the bytes read and written."""

    def buffer(self, key: int, count: int, dtype: DType) -> np.ndarray:
        """Return this thread's buffer of `count` elements under a key."""

    def finish(self, output: Output, start: int, encoded: np.ndarray) -> None:
        """Complete encoded elements before they are stored."""

    def report_nonfinite(self, source: Source) -> None:
        """Note a source that holds NaN or infinity, or raise InputError."""

    def done(self, output: Output, digest: str, inputs: dict[str, str]) -> None:
        """Record a complete output and its digests."""


class MemoryBudget:
    """Bytes that tasks may hold together. Whoever waits for them is the next to get them."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._held = capacity, 0
        self._turn, self._freed = threading.Lock(), threading.Condition()

    @contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Wait until so many bytes are free, then hold them."""
        assert nbytes <= self._capacity
        with self._turn, self._freed:
            self._freed.wait_for(lambda: self._held + nbytes <= self._capacity)
            self._held += nbytes
        try:
            yield
        finally:
            with self._freed:
                self._held -= nbytes
                self._freed.notify_all()


def merge_regions(executor: Run, budget: MemoryBudget, output: Output, statistic: Any) -> None:
    """Merge and store one output of a method whose unit is rows or the whole tensor."""
    if granularity(output) == "rows":
        RegionMerge(executor, output, statistic).run()
        return
    with budget.hold(region_bytes(output)):
        RegionMerge(executor, output, statistic).run()


class RegionMerge:
    """One output on its way: streams of its sources, and memory for one region of each."""

    def __init__(self, executor: Run, output: Output, statistic: Any) -> None:
        assert isinstance(output.operation, Merge)
        self.executor, self.output, self.operation, self.statistic = executor, output, output.operation, statistic
        self.encoded_N = executor.buffer(-1, WINDOW, output.dtype)
        # sources take turns, so one buffer does for all; what is in memory already is read in place
        self.streams = [Stream(s, executor.buffer(0, WINDOW, s.tensor.dtype)) for s in self.operation.sources]
        self.digest = TensorDigest()

    def run(self) -> None:
        """Region after region, then the digests."""
        region = max(1, region_size(self.output))
        memory_RN = np.empty((len(self.operation.experts) + 2) * region, np.float32)
        for start in range(0, self.output.size, region):
            self._merge(memory_RN, start, min(region, self.output.size - start))
        inputs = {stream.source.label: stream.digest() for stream in self.streams}
        self.executor.done(self.output, self.digest.digest(), inputs)

    def _merge(self, memory_N: np.ndarray, start: int, count: int) -> None:
        operation = self.operation
        flat = memory_N[: (len(operation.experts) + 2) * count].reshape(-1, count)
        theta_EN, base_N, out_N = flat[:-2], flat[-2], flat[-1]
        streams = iter(self.streams)
        if operation.base is not None:
            self._fill(next(streams), base_N)
        for theta_N in theta_EN:
            self._fill(next(streams), theta_N, base_N if operation.base is not None else None)
        extras = self._extras(streams, count)
        whole = operation.method.unit == "tensor"
        columns = columns_of(self.output.shape)
        shape = self.output.shape if whole else (count // columns, columns)
        block = Block(
            theta_EN, operation.weights_E, base_N, out_N, self.statistic, operation.keys_E, start, shape=shape, extras=extras
        )
        operation.method.merge(block)
        self._store(out_N, start)

    def _extras(self, streams: Iterator[Stream], count: int) -> Any:
        """Statistics of a region: an array KN with zeros for None, or a list of whole arrays."""
        extras = self.operation.extras
        if not extras:
            return None
        if self.operation.method.unit == "tensor":
            return [None if extra is None else self._whole(next(streams)) for extra in extras]
        extras_EN = np.zeros((len(extras), count), np.float32)
        for extra, extra_N in zip(extras, extras_EN, strict=True):
            if extra is not None:
                self._fill(next(streams), extra_N)
        return extras_EN

    def _whole(self, stream: Stream) -> np.ndarray:
        tensor = stream.source.tensor
        flat_N = np.empty(tensor.size, np.float32)
        self._fill(stream, flat_N)
        return flat_N.reshape(tensor.shape)

    def _fill(self, stream: Stream, out_N: np.ndarray, base_N: np.ndarray | None = None) -> None:
        if not stream.fill(out_N, base_N):
            self.executor.report_nonfinite(stream.source)
        self.executor.advance(out_N.size * stream.source.tensor.dtype.itemsize)

    def _store(self, out_N: np.ndarray, start: int) -> None:
        output = self.output
        for begin in range(0, out_N.size, WINDOW):
            part_N = out_N[begin : begin + WINDOW]
            encoded_N = self.encoded_N[: part_N.size]
            encode(part_N, output.dtype, encoded_N)
            self.executor.finish(output, start + begin, encoded_N)
            self.executor.store.write(output, start + begin, encoded_N)
            self.digest.update(encoded_N)
            self.executor.advance(encoded_N.nbytes)
