"""Statistics in safetensors files: written group by group into their final place, read by blocks, added up in streams."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np

from moerge.checkpoint.header import build_header, read_header, read_metadata
from moerge.checkpoint.workspace import machine_errors
from moerge.errors import InputError
from moerge.files import SourceFile
from moerge.statistics.facts import Facts, Kind, TextFacts, differing_settings, parse_facts
from moerge.system import flush
from moerge.tensors.dtypes import F32
from moerge.tensors.tensor import Tensor

_FACTS = "moerge.statistics"
_WINDOW = 1 << 20
"""Elements added up at a time."""
_NUMBER = 1.2345678901234567e-300
"""The longest number in JSON, in characters."""


def stored_name(kind: Kind, tensor: str) -> str:
    """Return the name of a tensor's statistic in the file."""
    return f"{kind}:{tensor}"


def statistics_file(folder: Path, expert: str) -> Path:
    """Return the path of an expert's statistics."""
    return folder / f"{expert}.safetensors"


@dataclass(frozen=True)
class Statistics:
    """One expert's sums over text: `fisher:NAME` in the shape of tensor NAME, `gram:NAME` as an upper triangle, row by row."""

    path: Path
    facts: Facts
    stored: Mapping[str, Tensor] = field(repr=False)

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """The file, as it was when its header was read."""
        return tuple({file: None for tensor in self.stored.values() for file in tensor.files})

    def fisher(self, tensor: str) -> Tensor | None:
        """The sum of squared gradients of a tensor."""
        return self.stored.get(stored_name("fisher", tensor)) if tensor in self.facts.fisher else None

    def gram(self, tensor: str) -> Tensor | None:
        """The sum of x^T x over the inputs of a linear layer, by the name of its weight; n * (n + 1) / 2 elements."""
        gram = self.facts.grams.get(tensor)
        return self.stored.get(gram.stored) if gram else None

    @cached_property
    def fisher_mean(self) -> float:
        """Mean over all entries of the summed Fisher information."""
        size = sum(self.stored[stored_name("fisher", name)].size for name in self.facts.fisher)
        return math.fsum(total for total, _ in self.facts.fisher.values()) / max(1, size)

    @cached_property
    def fisher_norm(self) -> float:
        """Norm over all entries of the summed Fisher information."""
        return math.sqrt(math.fsum(squares for _, squares in self.facts.fisher.values()))


@dataclass(frozen=True)
class Used:
    """Statistics of a model, by its name in a recipe, that a merge uses."""

    model: str
    statistics: Statistics

    @property
    def label(self) -> str:
        """Return the name of their tensors' model in digests and messages."""
        return f"statistics of {self.model}"


def open_statistics(path: Path) -> Statistics:
    """A statistics file's facts and the whereabouts of its sums; InputError if it is damaged or something else."""
    stored = read_header(path)
    facts = parse_facts(read_metadata(path).get(_FACTS, ""), path)
    wanted = {stored_name("fisher", name) for name in facts.fisher} | {gram.stored for gram in facts.grams.values()}
    if stored.keys() != wanted or any(tensor.dtype is not F32 for tensor in stored.values()):
        raise InputError(f"{path} does not hold the statistics that it lists: gather them again with 'moerge stats --force'")
    return Statistics(path, facts, stored)


def check_replaceable(path: Path) -> None:
    """Raise InputError if a file exists that does not hold statistics, such as the weights of a checkpoint in this folder."""
    try:
        ours = _FACTS in read_metadata(path) if read_header(path) else False
    except InputError:
        ours = False
    if not ours:
        raise InputError(
            f"{path} is no statistics file, so --force does not replace it: remove it yourself, or choose another folder",
            code="target-exists",
        )


class StatisticsWriter:
    """A statistics file on its way; a context manager that leaves nothing behind unless `finish` was called.

    `shapes` are the sums by stored name; the facts' sums of Fisher information are filled in as they are written.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], facts: Facts) -> None:
        self.path = path
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._shapes, self._facts = [(name, F32, shape) for name, shape in shapes.items()], facts
        self._totals = dict.fromkeys(facts.fisher, (0.0, 0.0))
        longest = facts.model_copy(update={"fisher": dict.fromkeys(facts.fisher, (_NUMBER, _NUMBER))})
        header, self._offsets = build_header(self._shapes, {_FACTS: longest.model_dump_json()})
        self._reserved = len(header) - 8
        with machine_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._aside, "wb")  # noqa: SIM115

    def add(self, name: str, total: np.ndarray) -> None:
        """A whole sum: Fisher information in any shape, or a Gram matrix, of which the upper triangle is stored."""
        if name.startswith("fisher:"):
            self.write(name, 0, total.reshape(-1))
            return
        place = 0
        for row, entries in enumerate(total):
            self.write(name, place, entries[row:])
            place += len(entries) - row

    def write(self, name: str, start: int, values_N: np.ndarray) -> None:
        """Elements `start` and following of a sum, rounded to float32."""
        data = np.ascontiguousarray(values_N, F32.storage)
        tensor = name.removeprefix("fisher:")
        if tensor in self._totals and name == stored_name("fisher", tensor):
            total, squares = totals(data)
            self._totals[tensor] = (self._totals[tensor][0] + total, self._totals[tensor][1] + squares)
        with machine_errors(self.path.parent):
            self._file.seek(self._offsets[name] + start * F32.itemsize)
            self._file.write(data.data)

    def finish(self) -> Facts:
        """Add the facts, make the file durable and give it its name; returns the facts."""
        facts = self._facts.model_copy(update={"fisher": self._totals})
        header, _ = build_header(self._shapes, {_FACTS: facts.model_dump_json()})
        text = header[8:].rstrip(b" ").ljust(self._reserved)
        assert len(text) == self._reserved
        with machine_errors(self.path.parent):
            self._file.seek(0)
            self._file.write(struct.pack("<Q", len(text)) + text)
            self._file.flush()
            flush(self._file.fileno())
            self._file.close()  # Windows renames no open file
            os.replace(self._aside, self.path)
        return facts

    def __enter__(self) -> StatisticsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with suppress(OSError):  # a full disk; the error that matters is already on its way
            self._file.close()
        self._aside.unlink(missing_ok=True)


def add_up(parts: Sequence[Statistics], path: Path) -> Facts:
    """Write the sum of an expert's statistics from several machines; InputError if they do not belong together.

    Sums are read and written a million elements at a time.
    """
    facts = _summed_facts(parts)
    shapes = {name: tensor.shape for name, tensor in parts[0].stored.items()}
    with StatisticsWriter(path, shapes, facts) as writer:
        for name, tensor in parts[0].stored.items():
            opened = [part.stored[name].open() for part in parts]
            for start in range(0, tensor.size, _WINDOW):
                buffer_N = np.empty(min(_WINDOW, tensor.size - start), F32.storage)
                sum_N = np.zeros(buffer_N.size)
                for elements in opened:
                    sum_N += elements.read(start, buffer_N)
                writer.write(name, start, sum_N)
        return writer.finish()


def totals(values_N: np.ndarray) -> tuple[float, float]:
    """The sum of some entries and the sum of their squares."""
    flat_N, total, squares = values_N.reshape(-1), 0.0, 0.0
    for start in range(0, flat_N.size, _WINDOW):
        wide_N = flat_N[start : start + _WINDOW].astype(np.float64)
        total, squares = total + float(wide_N.sum()), squares + float(wide_N @ wide_N)
    return total, squares


def _summed_facts(parts: Sequence[Statistics]) -> Facts:
    first = parts[0]
    for other in parts[1:]:
        _check_belongs(first, other)
    texts: list[TextFacts] = []
    for part in parts:
        for text in part.facts.texts:
            twice = max((text.overlap(known) for known in texts), default=0)
            if twice:
                raise InputError(f"{part.path}: {twice} of its texts are counted in another file too: gather each text once")
            texts.append(text)
    counts = {key: sum(getattr(part.facts, key) for part in parts) for key in ("sequences", "tokens", "predicted")}
    return first.facts.model_copy(update={"texts": tuple(texts), **counts})


def _check_belongs(first: Statistics, other: Statistics) -> None:
    both = f"{first.path} and {other.path}"
    if not first.facts.model.is_same(other.facts.model):
        raise InputError(f"{both} were gathered on different models: gather one of them again")
    if first.facts.settings != other.facts.settings:
        different = differing_settings(first.facts.settings, other.facts.settings)
        raise InputError(f"{both} were gathered with different settings ({different}): gather one of them again")
    if first.facts.names != other.facts.names:
        raise InputError(f"{both} hold different statistics: gather both with the same --kind")
    if {n: t.shape for n, t in first.stored.items()} != {n: t.shape for n, t in other.stored.items()}:
        raise InputError(f"{both} hold sums of different shapes: gather one of them again")
