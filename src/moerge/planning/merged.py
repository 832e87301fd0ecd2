"""A recipe as one of the models of another: its tensors are merged as they are read, and never stored.

They are what a merge would have written, to the bit, in the element type of their recipe.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moerge.checkpoint.manifest import to_json
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.execution.executor import Executor
from moerge.execution.regions import MemoryBudget, merge_regions
from moerge.execution.schedule import run_at_once
from moerge.execution.store import MemoryStore
from moerge.files import SourceFile, TemporaryFolder
from moerge.operations.estimate import largest
from moerge.operations.operations import Merge, Output
from moerge.planning.plan import Plan
from moerge.tensors.dtypes import DType
from moerge.tensors.source import Source
from moerge.tensors.tensor import Sized, Tensor
from moerge.tensors.threads import single_threaded_blas

_WHOLE = 3
"""Tensors in memory of methods that need them whole: readers go from one to the next, a few at a time."""


@dataclass(frozen=True)
class MergedCheckpoint(Checkpoint):
    """The result of `plan`. `folder` has its small files and no tensors; it is removed with `home`."""

    plan: Plan = field(kw_only=True, repr=False)
    home: TemporaryFolder = field(kw_only=True, repr=False)

    @property
    def folders(self) -> tuple[Path, ...]:
        """Return the files of the models that it is merged from."""
        return tuple(folder for model in self.plan.models for folder in model.folders)

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """The models that it is merged from."""
        return tuple(origin for model in self.plan.models for origin in model.origins)

    @property
    def commits(self) -> dict[str, str | None]:
        """Return the sources of the models that it is merged from, by this name and theirs."""
        return {f"{self.name}/{name}": commit for model in self.plan.models for name, commit in model.commits.items()}

    @property
    def identity(self) -> tuple[Any, ...]:
        """Return a key for everything that decides its tensors."""
        return (*super().identity, self.plan.fingerprint)

    @property
    def stored_as(self) -> str:
        """The element types, of what is merged."""
        return f"merged {super().stored_as}"

    @property
    def working_bytes(self) -> int:
        """Blocks of all sources, for every thread, and whole tensors."""
        outputs = self.plan.outputs
        whole = [output.nbytes for output in outputs if _by_region(output)]
        return self.plan.merging_bytes(os.cpu_count() or 1) + _WHOLE * max(whole, default=0)


def merged_checkpoint(plan: Plan, name: str, location: str) -> MergedCheckpoint:
    """A plan as a model called `name`. Raises InputError where a part of it can only be computed from files."""
    if plan.fit_jobs:
        title = plan.fit_jobs[0].fitter.title
        raise InputError(
            f"{name}: {plan.recipe.source}: {title} can only be computed once the rest is written: merge this recipe into a "
            "folder first, and name that"
        )
    if plan.float8:
        raise InputError(
            f"{name}: {plan.recipe.source}: dtype float8 is for results that are written: choose another dtype there"
        )
    home = TemporaryFolder()
    folder = home.folder
    for file, content in {**plan.files, "config.json": to_json(plan.config)}.items():
        (folder / file).write_bytes(content)
    tensors = merged_tensors(plan.outputs)
    return MergedCheckpoint(
        name,
        location,
        folder,
        plan.config,
        tensors,
        complete=plan.complete,
        warnings=tuple(f"{name}: {text}" for text in plan.warnings),
        plan=plan,
        home=home,
    )


def merged_tensors(outputs: Sequence[Output]) -> Mapping[str, Tensor]:
    """Outputs as tensors that are computed as they are read, by name."""
    merging = _Merging(outputs)
    return {output.name: _MergedTensor(output, merging) for output in outputs}


@dataclass(frozen=True)
class _MergedTensor(Sized):
    """An output of a plan."""

    output: Output
    merging: _Merging = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The output's."""
        return self.output.name

    @property
    def dtype(self) -> DType:
        """The output's."""
        return self.output.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's."""
        return self.output.shape

    @cached_property
    def files(self) -> tuple[SourceFile, ...]:
        """All files that it is merged from."""
        return tuple(dict.fromkeys(file for source in self.output.operation.sources for file in source.tensor.files))

    @property
    def parts(self) -> tuple[Source, ...]:
        """Return its sources, for the search for NaN."""
        return self.output.operation.sources

    def open(self) -> _MergedTensor:
        """Access to its elements."""
        return self

    def read(self, start: int, out_N: np.ndarray) -> np.ndarray:
        """Fill `out_N` with elements `start` and following, and return it."""
        self.merging.read(self.output, start, out_N)
        return out_N


class _Merging:
    """Merges parts of outputs as they are asked for, from any thread."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self._outputs, self._statistics = outputs, dict[str, Any]()
        self._arrays = MemoryStore()
        self._executor = Executor(self._arrays, allow_nonfinite=True)
        self._measuring, self._merging = threading.Lock(), threading.Lock()
        self._whole: OrderedDict[str, np.ndarray] = OrderedDict()

    def read(self, output: Output, start: int, out_N: np.ndarray) -> None:
        """Elements `start` and following, as many as `out_N` has."""
        if _by_region(output):
            out_N[:] = self._tensor(output)[start : start + out_N.size]
        else:
            self._executor.make(output, self._statistic(output), start, out_N)

    def _statistic(self, output: Output) -> Any:
        if not isinstance(output.operation, Merge) or not output.operation.method.measures:
            return None
        with self._measuring:
            if output.name not in self._statistics:
                if not self._statistics:
                    merges = [o.operation for o in self._outputs if isinstance(o.operation, Merge)]
                    self._executor.measure_model(merges, os.cpu_count() or 1)
                self._statistics[output.name] = run_at_once(self._executor.statistic(output.operation))
            return self._statistics[output.name]

    def _tensor(self, output: Output) -> np.ndarray:
        statistic = self._statistic(output)
        with self._merging:
            if output.name not in self._whole:
                with single_threaded_blas():
                    merge_regions(self._executor, MemoryBudget(largest([output])), output, statistic)
                self._whole[output.name] = self._arrays.pop(output)
                if len(self._whole) > _WHOLE:
                    self._whole.popitem(last=False)
            return self._whole[output.name]


def _by_region(output: Output) -> bool:
    return isinstance(output.operation, Merge) and output.operation.method.unit != "block"
