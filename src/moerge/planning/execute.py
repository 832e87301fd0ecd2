"""The executor: every operation of a plan, block by block, into a store.

Memory is a few blocks for each thread, whatever the size of tensors and models. Nothing here depends on which thread does
what: results are functions of the inputs alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from moerge.checkpoint.digest import CHUNK, chunk_digest, tensor_digest
from moerge.checkpoint.dtypes import F32
from moerge.errors import InputError
from moerge.methods.codec import all_finite, decode, encode
from moerge.methods.method import Block, MergeMethod, Statistic
from moerge.methods.random import stream_key, uniform
from moerge.planning.operations import Copy, Draw, Merge, Output, Source
from moerge.planning.schedule import Job, Task, run_jobs

BLOCK = 1 << 15
"""Elements a block: with three experts its float32 copies stay inside a megabyte of second-level cache."""
assert CHUNK % BLOCK == BLOCK % 2 == 0


class Store(Protocol):
    """Where outputs go."""

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        """Elements `start` and following of an output, in its storage type."""
        ...

    def done(self, output: Output, digest: str, inputs: dict[str, str]) -> None:
        """An output is complete; `inputs` are the digests of what was read for it, by "model:tensor"."""
        ...

    def finished(self, output: Output) -> bool:
        """Whether an earlier, interrupted run completed this output."""
        ...


@dataclass
class Execution:
    """One run over outputs. `advance(bytes)` is called as work proceeds, from any thread."""

    store: Store
    allow_nonfinite: bool = False
    advance: Callable[[int], None] = lambda nbytes: None
    nonfinite: set[str] = field(default_factory=set)

    def run(self, outputs: Sequence[Output], threads: int) -> None:
        """Compute and store all outputs."""
        pending = [output for output in outputs if not self.store.finished(output)]
        self._measured: dict[MergeMethod, Any] = {}
        self._local = threading.local()
        # A threshold that spans the model spans all of it, also what an interrupted run has already written.
        run_jobs(self._model_measurements(outputs, bool(pending)), threads)
        run_jobs((self._produce(output) for output in pending), threads)

    def _model_measurements(self, outputs: Sequence[Output], needed: bool) -> Iterator[Job]:
        spanning: dict[MergeMethod, list[Merge]] = {}
        for output in outputs if needed else ():
            operation = output.operation
            if isinstance(operation, Merge) and operation.method.spans_model:
                spanning.setdefault(operation.method, []).append(operation)
        for method, operations in spanning.items():
            yield self._measure_model(method, operations)

    def _measure_model(self, method: MergeMethod, operations: Sequence[Merge]) -> Job:
        self._measured[method] = yield from self._measure(method, operations)

    def _produce(self, output: Output) -> Job:
        operation = output.operation
        statistic = None
        if isinstance(operation, Merge) and operation.method.measures:
            if operation.method.spans_model:
                statistic = self._measured[operation.method]
            else:
                statistic = yield from self._measure(operation.method, [operation])
        sources = [_Opened(source) for source in operation.sources]
        produce = {Copy: self._copy_chunk, Merge: self._merge_chunk, Draw: self._draw_chunk}[type(operation)]
        chunks = range(0, output.size, CHUNK)
        results = yield [partial(produce, output, sources, statistic, start) for start in chunks]
        digest = tensor_digest(result[0] for result in results)
        inputs = {source.label: tensor_digest(result[1 + i] for result in results) for i, source in enumerate(sources)}
        self.store.done(output, digest, inputs)

    def _measure(self, method: MergeMethod, operations: Sequence[Merge]) -> Any:
        """Drive a method's measurement over the blocks of some operations; its tasks go to the scheduler."""
        size = sum(operation.experts[0].tensor.size for operation in operations)
        steps = method.measure(len(operations[0].experts), size)
        total: Any = None
        try:
            while True:
                sums = _OrderedSum(steps.send(total))
                yield _measuring_tasks(operations, partial(self._measure_chunk, sums))
                total = sums.total
        except StopIteration as finished:
            return finished.value

    def _measure_chunk(self, sums: _OrderedSum, operation: Merge, index: int, start: int) -> None:
        sources = [_Opened(source) for source in operation.sources]
        share = sums.statistic.zeros()
        stop = min(start + CHUNK, sources[0].size)
        for begin in range(start, stop, BLOCK):
            work = self._load(operation, sources, begin, min(begin + BLOCK, stop))
            sums.statistic.add(work.theta_KN, share)
        sums.add(index, share)
        self.advance(sum(source.bytes_of(stop - start) for source in sources))

    def _merge_chunk(self, output: Output, sources: list[_Opened], statistic: Any, start: int) -> list[bytes]:
        operation = output.operation
        assert isinstance(operation, Merge)
        stop = min(start + CHUNK, output.size)
        encoded = self._buffer(stop - start, output)
        method, weights_K = operation.method, np.array(operation.weights, np.float32)
        seed = method.random_seed
        keys = [stream_key(seed, s.model, s.tensor.name) for s in operation.experts] if seed is not None else []
        keys_K = np.array(keys, np.uint64)
        for begin in range(start, stop, BLOCK):
            end = min(begin + BLOCK, stop)
            work = self._load(operation, sources, begin, end)
            method.merge(Block(work.theta_KN, weights_K, work.base_N, work.out_N, statistic, keys_K, begin))
            encode(work.out_N, output.dtype, encoded[begin - start : end - start])
        self.store.write(output, start, encoded)
        self.advance(sum(source.bytes_of(stop - start) for source in sources) + encoded.nbytes)
        return [chunk_digest(encoded), *(chunk_digest(source.data[start:stop]) for source in sources)]

    def _copy_chunk(self, output: Output, sources: list[_Opened], statistic: Any, start: int) -> list[bytes]:
        (source,) = sources
        data = source.data[start : start + CHUNK]
        if not all_finite(data, output.dtype):
            self._report_nonfinite(source)
        self.store.write(output, start, data)
        self.advance(2 * data.nbytes)
        digest = chunk_digest(data)
        return [digest, digest]

    def _draw_chunk(self, output: Output, sources: list[_Opened], statistic: Any, start: int) -> list[bytes]:
        draw = output.operation
        assert isinstance(draw, Draw)
        count = min(CHUNK, output.size - start)
        values = uniform(stream_key(draw.seed, output.name), start, count) * np.float32(draw.bound)
        encoded = np.empty(count, output.dtype.storage)
        encode(values, output.dtype, encoded)
        self.store.write(output, start, encoded)
        self.advance(encoded.nbytes)
        return [chunk_digest(encoded)]

    def _load(self, operation: Merge, sources: list[_Opened], start: int, stop: int) -> _Workspace:
        """Elements start .. stop of all sources as float32: experts' values, or their differences to the base."""
        work = self._workspace(len(operation.experts)).first(stop - start)
        experts = sources
        if operation.base is not None:
            base, *experts = sources
            self._decode(base, start, stop, work.base_N)
        for expert, theta_N in zip(experts, work.theta_KN, strict=True):
            self._decode(expert, start, stop, theta_N)
            if operation.base is not None:
                np.subtract(theta_N, work.base_N, out=theta_N)
        return work

    def _decode(self, source: _Opened, start: int, stop: int, out_N: np.ndarray) -> None:
        if not decode(source.data[start:stop], source.dtype, out_N):
            self._report_nonfinite(source)

    def _report_nonfinite(self, source: _Opened) -> None:
        self.nonfinite.add(source.label)
        if not self.allow_nonfinite:
            model, _, name = source.label.partition(":")
            raise InputError(
                f"{model}: tensor {name!r} holds NaN or infinity: repair or drop this expert, "
                "or merge anyway with --allow-nonfinite"
            )

    def _workspace(self, experts: int) -> _Workspace:
        spaces: dict[int, _Workspace] = self._local.__dict__.setdefault("spaces", {})
        if experts not in spaces:
            flat = np.empty((experts + 2) * BLOCK, np.float32)
            spaces[experts] = _Workspace(flat, experts, BLOCK)
        return spaces[experts]

    def _buffer(self, count: int, output: Output) -> np.ndarray:
        if "buffer" not in self._local.__dict__:
            self._local.buffer = np.empty(CHUNK * F32.itemsize, np.uint8)
        buffer: np.ndarray = self._local.buffer
        return buffer[: count * output.dtype.itemsize].view(output.dtype.storage)


class _Workspace:
    """One thread's float32 block: experts, base, result. Contiguous at any length, so that kernels compile once."""

    def __init__(self, flat: np.ndarray, experts: int, count: int) -> None:
        self._flat, self._experts = flat, experts
        self.theta_KN = flat[: experts * count].reshape(experts, count)
        self.base_N, self.out_N = flat[experts * count :][: 2 * count].reshape(2, count)

    def first(self, count: int) -> _Workspace:
        """The same memory for a shorter block."""
        return self if count == self.out_N.size else _Workspace(self._flat, self._experts, count)


class _Opened:
    """A source whose bytes are mapped."""

    def __init__(self, source: Source) -> None:
        self.label = f"{source.model}:{source.tensor.name}"
        self.dtype, self.size = source.tensor.dtype, source.tensor.size
        self.data = source.tensor.open()

    def bytes_of(self, elements: int) -> int:
        return elements * self.dtype.itemsize


class _OrderedSum:
    """Adds up chunks' shares in the order of their indices, whatever the order they arrive in."""

    def __init__(self, statistic: Statistic) -> None:
        self.statistic = statistic
        self.total = statistic.zeros()
        self._lock = threading.Lock()
        self._waiting: dict[int, np.ndarray] = {}
        self._next = 0

    def add(self, index: int, share: np.ndarray) -> None:
        with self._lock:
            self._waiting[index] = share
            while self._next in self._waiting:
                self.total += self._waiting.pop(self._next)
                self._next += 1


def _measuring_tasks(operations: Iterable[Merge], task: Callable[[Merge, int, int], None]) -> list[Task]:
    chunks = [(operation, start) for operation in operations for start in range(0, operation.experts[0].tensor.size, CHUNK)]
    return [partial(task, operation, index, start) for index, (operation, start) in enumerate(chunks)]
