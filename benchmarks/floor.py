"""The floor: a merge's reading and writing without the merge.

For every output tensor of the plan, piece by piece: each source's bytes are read with preadv into one reused buffer of
1 MiB a thread, then the output's bytes are written from it with pwrite. The output is one fresh file, allocated first
(posix_fallocate) as the merge does it; pieces go to as many threads as the merge uses. Nothing is computed. Of the ways
that were tried (pieces of 128 KiB to 8 MiB, with and without allocating, one file or two, mmap) none was reliably faster.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from moerge.planning.plan import Plan

PIECE = 1 << 20


@dataclass(frozen=True)
class FloorRun:
    """Seconds until all is written, until it is on the disk, and of CPU; bytes that came from the disk, not from memory."""

    write_seconds: float
    durable_seconds: float
    cpu_seconds: float
    disk_read_bytes: int


@dataclass(frozen=True)
class _Piece:
    sources: tuple[tuple[Path, int], ...]
    position: int
    count: int


def measure_floor(plan: Plan, out: Path, threads: int) -> FloorRun:
    """Time reading and writing what the plan reads and writes; removes the file again."""
    pieces = _pieces(plan)
    total = pieces[-1].position + pieces[-1].count
    local = threading.local()
    with ExitStack() as stack:
        files = {path: _opened(stack, path, os.O_RDONLY) for piece in pieces for path, _ in piece.sources}
        stack.callback(out.unlink)
        disk, cpu, begun = _disk_read_bytes(), _cpu_seconds(), time.perf_counter()
        target = _opened(stack, out, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.posix_fallocate(target, 0, total)

        def move(piece: _Piece) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(bytearray(PIECE))
            view = local.buffer[: piece.count]
            for path, offset in piece.sources:
                assert os.preadv(files[path], [view], offset) == piece.count
            assert os.pwrite(target, view, piece.position) == piece.count

        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(move, pieces):
                pass
        written = time.perf_counter()
        os.fsync(target)
        durable = time.perf_counter()
        return FloorRun(written - begun, durable - begun, _cpu_seconds() - cpu, _disk_read_bytes() - disk)


def warm(plan: Plan) -> None:
    """Read every file that the plan reads, so that it lies in the page cache."""
    view = memoryview(bytearray(4 * PIECE))
    for path in sorted({path for piece in _pieces(plan) for path, _ in piece.sources}):
        with path.open("rb", buffering=0) as file:
            while file.readinto(view):
                pass


def _pieces(plan: Plan) -> list[_Piece]:
    """The output's bytes in the plan's order, at most PIECE at a time, and what is read for each."""
    pieces, position = [], 0
    for output in plan.outputs:
        sources = [(source.tensor.file, source.tensor.offset) for source in output.operation.sources]
        for start in range(0, output.nbytes, PIECE):
            count = min(PIECE, output.nbytes - start)
            pieces.append(_Piece(tuple((path, offset + start) for path, offset in sources), position, count))
            position += count
    return pieces


def _opened(stack: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags, 0o666)
    stack.callback(os.close, descriptor)
    return descriptor


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _disk_read_bytes() -> int:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
