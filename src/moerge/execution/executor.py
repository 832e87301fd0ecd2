"""The executor: every operation of a plan, block by block, into a store.

Memory is a few blocks for each thread, whatever the size of tensors and models. Nothing here depends on which thread does
what: results are functions of the inputs alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.execution.measuring import OrderedSum, Piece, chunked, sampled
from moerge.execution.regions import MemoryBudget, merge_regions
from moerge.execution.schedule import Job, Task, run_jobs
from moerge.execution.store import NullStore, Store
from moerge.methods.method import Block, Measurement, MergeMethod
from moerge.operations.estimate import largest
from moerge.operations.operations import Copy, Draw, Fit, Merge, Output
from moerge.tensors.codec import all_finite, decode, encode
from moerge.tensors.digest import CHUNK, running_digest, tensor_digest
from moerge.tensors.dtypes import DType
from moerge.tensors.random import stream_key, uniform
from moerge.tensors.source import Source
from moerge.tensors.streams import BLOCK, WINDOW, Reader
from moerge.tensors.threads import single_threaded_blas
from moerge.tensors.views.joined import nonfinite_source

JobSteps = Generator[Sequence[Task], list[Any], Any]
"""A part of a job that returns something."""


@dataclass
class Executor:
    """One run over outputs. `advance(bytes)` is called as work proceeds, from any thread."""

    store: Store = field(default_factory=NullStore)
    allow_nonfinite: bool = False
    advance: Callable[[int], None] = lambda nbytes: None
    nonfinite: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._local = threading.local()
        self._measured: dict[MergeMethod, Any] = {}

    def run(self, outputs: Sequence[Output], threads: int) -> None:
        """Compute and store all outputs but those that are fitted to the others."""
        outputs = [output for output in outputs if not isinstance(output.operation, Fit)]
        self._budget = MemoryBudget(largest(outputs))
        finished: set[str] = set()
        run_jobs((self._check(output, finished) for output in outputs), threads)
        pending = [output for output in outputs if output.name not in finished]
        # A threshold that spans the model spans all of it, also what an interrupted run has already written.
        merges = [output.operation for output in outputs if isinstance(output.operation, Merge)]
        self.measure_model(merges if pending else [], threads)
        # What decomposes whole tensors adds up in an order that depends on the threads BLAS may use.
        with single_threaded_blas() if largest(pending) else nullcontext():
            run_jobs((self._produce(output) for output in pending), threads)

    def _check(self, output: Output, finished: set[str]) -> Job:
        (is_finished,) = yield [partial(self.store.finished, output)]
        if is_finished:
            finished.add(output.name)
            self.advance(output.work_bytes)

    def measure_model(self, operations: Sequence[Merge], threads: int) -> None:
        """Measure what methods that span the model need to know before they merge, over these operations together."""
        spanning: dict[MergeMethod, list[Merge]] = {}
        for operation in operations:
            if operation.method.spans_model:
                spanning.setdefault(operation.method.measured_as, []).append(operation)
        run_jobs((self._measure_model(method, spanned) for method, spanned in spanning.items()), threads)

    def _measure_model(self, method: MergeMethod, operations: Sequence[Merge]) -> Job:
        size = sum(operation.experts[0].tensor.size for operation in operations)
        steps = method.measure(len(operations[0].experts), size)
        self._measured[method] = yield from self.measure(steps, method.measures, operations)

    def statistic(self, operation: Merge) -> JobSteps:
        """Measure the statistic that the operation's method needs before it merges, None for none; part of a job, after
        `measure_model`.
        """
        method = operation.method
        if not method.measures:
            return None
        if method.spans_model:
            return self._measured[method.measured_as]
        steps = method.measure_tensor(len(operation.experts), operation.experts[0].tensor.shape)
        return (yield from self.measure(steps, method.measures, [operation]))

    def _produce(self, output: Output) -> Job:
        operation = output.operation
        statistic = (yield from self.statistic(operation)) if isinstance(operation, Merge) else None
        if isinstance(operation, Merge) and operation.method.unit != "block":
            yield [partial(merge_regions, self, self._budget, output, statistic)]
            return
        results = yield [partial(self._produce_chunk, output, statistic, start) for start in range(0, output.size, CHUNK)]
        digest = tensor_digest(result[0] for result in results)
        labels = [source.label for source in operation.sources]
        inputs = {label: tensor_digest(result[1 + i] for result in results) for i, label in enumerate(labels)}
        self.done(output, digest, inputs)

    def done(self, output: Output, digest: str, inputs: dict[str, str]) -> None:
        """An output is complete."""
        self.store.done(output, digest, inputs, [label for label in inputs if label in self.nonfinite])

    def _produce_chunk(self, output: Output, statistic: Any, start: int) -> list[bytes]:
        """Store one chunk of an output; its digest and those of the same chunk of every source."""
        operation, stop = output.operation, min(start + CHUNK, output.size)
        readers = self._readers(operation.sources, start, stop)
        produced = running_digest()
        for begin in range(start, stop, WINDOW):
            end = min(begin + WINDOW, stop)
            data = self._made(output, readers, statistic, begin, end)
            self.store.write(output, begin, data)
            produced.update(data)
            self.advance(data.nbytes + sum(reader.bytes_of(end - begin) for reader in readers))
        return [produced.digest(), *(reader.digest() for reader in readers)]

    def make(self, output: Output, statistic: Any, start: int, out_N: np.ndarray) -> None:
        """Fill `out_N`, in storage type, with elements `start` and following of an output; not of one that is merged whole."""
        stop, even = start + out_N.size, start - start % 2  # where blocks begin
        readers = self._readers(output.operation.sources, even, stop)
        for begin in range(even, stop, WINDOW):
            end, first = min(begin + WINDOW, stop), max(begin, start)
            out_N[first - start : end - start] = self._made(output, readers, statistic, begin, end)[first - begin :]

    def _made(self, output: Output, readers: list[Reader], statistic: Any, start: int, stop: int) -> np.ndarray:
        """Elements start .. stop, at most a window, in storage type."""
        operation = output.operation
        if isinstance(operation, Copy):
            return self._copied(output, readers[0], start, stop)
        if isinstance(operation, Merge):
            return self._merged(output, operation, readers, statistic, start, stop)
        assert isinstance(operation, Draw)
        return self._drawn(output, operation, start, stop)

    def measure(self, steps: Measurement, passes: int, operations: Sequence[Merge]) -> JobSteps:
        """Drive a measurement, which makes at most so many `passes`, over some operations; part of a job."""
        unread = passes * sum(source.tensor.nbytes for operation in operations for source in operation.values)
        total: Any = None
        try:
            while True:
                statistic = steps.send(total)
                sums = OrderedSum(statistic)
                pieces = sampled(operations, statistic.runs) if statistic.runs else chunked(operations)
                read = yield [partial(self._measure_piece, sums, index, piece) for index, piece in enumerate(pieces)]
                unread -= sum(read)
                total = sums.total
        except StopIteration as finished:
            self.advance(max(0, unread))  # what progress had expected and a clever method did not need
            return finished.value

    def _measure_piece(self, sums: OrderedSum, index: int, piece: Piece) -> int:
        """Add a piece's share to a statistic; the bytes that were read."""
        readers = self._readers(piece.operation.values, piece.start, piece.stop)
        share = sums.share()
        for begin in range(piece.start, piece.stop, BLOCK):
            work = self._load(piece.operation, readers, begin, min(begin + BLOCK, piece.stop))
            base = (work.base_N,) if sums.statistic.uses_base else ()
            start = (begin,) if sums.statistic.uses_start else ()
            sums.statistic.add(work.theta_EN, share, *base, *start)
        sums.add(index, share)
        nbytes = sum(reader.bytes_of(piece.stop - piece.start) for reader in readers)
        self.advance(nbytes)
        return nbytes

    def _copied(self, output: Output, reader: Reader, start: int, stop: int) -> np.ndarray:
        data = reader.take(start, stop)
        if not all_finite(data, output.dtype):
            self.report_nonfinite(reader.source)
        return data

    def _drawn(self, output: Output, draw: Draw, start: int, stop: int) -> np.ndarray:
        values = uniform(stream_key(draw.seed, output.name), start, stop - start) * np.float32(draw.bound)
        values += np.float32(0)  # no -0
        encoded = self.buffer(-1, stop - start, output.dtype)
        encode(values, output.dtype, encoded)
        return encoded

    def _merged(
        self, output: Output, operation: Merge, readers: list[Reader], statistic: Any, start: int, stop: int
    ) -> np.ndarray:
        weights_E, keys_E = operation.weights_E, operation.keys_E
        encoded = self.buffer(-1, stop - start, output.dtype)
        for begin in range(start, stop, BLOCK):
            end = min(begin + BLOCK, stop)
            work = self._load(operation, readers, begin, end)
            extras_EN = self._extras(operation, readers, begin, end)
            shape = (end - begin,)
            operation.method.merge(
                Block(work.theta_EN, weights_E, work.base_N, work.out_N, statistic, keys_E, begin, shape=shape, extras=extras_EN)
            )
            encode(work.out_N, output.dtype, encoded[begin - start : end - start])
        self.finish(output, start, encoded)
        return encoded

    def finish(self, output: Output, start: int, encoded: np.ndarray) -> None:
        """Put in rows that are copied as they are; InputError if values overflowed the output's type, unless that is allowed."""
        if isinstance(output.operation, Merge) and output.operation.exact is not None:
            output.operation.exact.put(start, encoded, output.dtype)
        if not self.allow_nonfinite and not all_finite(encoded, output.dtype):
            raise InputError(
                f"tensor {output.name!r}: merged values are too large for {output.dtype.torch_name}: choose another 'dtype', "
                "a smaller 'scale' or smaller weights, or merge anyway with --allow-nonfinite"
            )

    def _extras(self, operation: Merge, readers: list[Reader], start: int, stop: int) -> np.ndarray | None:
        """Elements start .. stop of the experts' statistics as float32, zeros where an expert has none."""
        if not operation.extras:
            return None
        remaining = iter(readers[len(operation.values) :])
        extras_EN = np.zeros((len(operation.extras), stop - start), np.float32)
        for extra, extra_N in zip(operation.extras, extras_EN, strict=True):
            if extra is not None:
                self._decode(next(remaining), start, stop, extra_N)
        return extras_EN

    def _load(self, operation: Merge, readers: list[Reader], start: int, stop: int) -> _Workspace:
        """Elements start .. stop of all experts as float32: their values, or their differences to the base."""
        work = self._workspace(len(operation.experts)).first(stop - start)
        experts = readers[: len(operation.values)]
        if operation.base is not None:
            base, *experts = experts
            self._decode(base, start, stop, work.base_N)
        for expert, theta_N in zip(experts, work.theta_EN, strict=True):
            self._decode(expert, start, stop, theta_N, work.base_N if operation.base is not None else None)
        return work

    def _decode(self, reader: Reader, start: int, stop: int, out_N: np.ndarray, base_N: np.ndarray | None = None) -> None:
        if not decode(reader.take(start, stop), reader.dtype, out_N, base_N):
            self.report_nonfinite(reader.source)

    def report_nonfinite(self, source: Source) -> None:
        """Note that a source holds NaN or infinity; InputError unless that is allowed."""
        self.nonfinite.add(source.label)
        if not self.allow_nonfinite:
            source = nonfinite_source(source)
            raise InputError(
                f"{source.model}: tensor {source.tensor.name!r} holds NaN or infinity: "
                "repair or drop this expert, or merge anyway with --allow-nonfinite"
            )

    def _readers(self, sources: Sequence[Source], start: int, stop: int) -> list[Reader]:
        buffers = [self.buffer(i, WINDOW, source.tensor.dtype) for i, source in enumerate(sources)]
        return [Reader(source, start, stop, buffer) for source, buffer in zip(sources, buffers, strict=True)]

    def _workspace(self, experts: int) -> _Workspace:
        spaces: dict[int, _Workspace] = self._local.__dict__.setdefault("spaces", {})
        if experts not in spaces:
            flat = np.empty((experts + 2) * BLOCK, np.float32)
            spaces[experts] = _Workspace(flat, experts, BLOCK)
        return spaces[experts]

    def buffer(self, key: int, count: int, dtype: DType) -> np.ndarray:
        """This thread's reusable memory for `count` elements; one for each source, and -1 for the output."""
        buffers: dict[int, np.ndarray] = self._local.__dict__.setdefault("buffers", {})
        if key not in buffers:
            buffers[key] = np.empty(WINDOW * 8, np.uint8)
        return buffers[key][: count * dtype.itemsize].view(dtype.storage)


class _Workspace:
    """One thread's float32 block: experts, base, result. Contiguous at any length, so that kernels compile once."""

    def __init__(self, flat: np.ndarray, experts: int, count: int) -> None:
        self._flat, self._experts = flat, experts
        self.theta_EN = flat[: experts * count].reshape(experts, count)
        self.base_N, self.out_N = flat[experts * count :][: 2 * count].reshape(2, count)

    def first(self, count: int) -> _Workspace:
        """Return the first part of the memory, for a shorter block."""
        return self if count == self.out_N.size else _Workspace(self._flat, self._experts, count)
