"""The plan: everything that will happen, known before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moerge.calibration import Texts
from moerge.checkpoint.dtypes import F32
from moerge.checkpoint.reader import Checkpoint
from moerge.planning.execute import BLOCK, WINDOW
from moerge.planning.operations import Copy, Draw, Fit, Operation, Output
from moerge.recipe.schema import Recipe

_INTERPRETER_BYTES = 150_000_000
_TORCH_BYTES = 500_000_000
_BYTES_READ_PER_SECOND = 2e9
_BYTES_WRITTEN_PER_SECOND = 0.5e9
"""What an ordinary SSD does, for the estimate of time; a cold or busy disk is slower."""


@dataclass(frozen=True)
class Plan:
    """Outputs in order, with the config and files that go beside them.

    `models` holds the base first, where there is one; `experts` names the MoE's experts in the order of their indices, and
    is empty for a dense merge.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    outputs: tuple[Output, ...]
    config: Mapping[str, Any]
    files: Mapping[str, Path]
    experts: tuple[str, ...] = ()
    calibration: tuple[Texts, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether all inputs are on this machine; Hub models that are not will be downloaded before merging."""
        return all(model.complete for model in self.models)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the result."""
        return sum(output.size for output in self.outputs)

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of tensors written."""
        return sum(output.nbytes for output in self.outputs)

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of distinct tensors read."""
        return sum({(s.model, s.tensor.name): s.tensor.nbytes for o in self.outputs for s in o.operation.sources}.values())

    @cached_property
    def work_bytes(self) -> int:
        """Bytes read and written by all passes, what progress counts."""
        return sum(output.work_bytes for output in self.outputs)

    def memory_bytes(self, threads: int) -> int:
        """An upper estimate of the working memory in bytes: blocks for each thread, and Python itself."""
        sources = max((len(output.operation.sources) for output in self.outputs), default=1)
        buffers = (sources + 1) * (WINDOW + BLOCK) * F32.itemsize
        histograms = 2 * sources * (1 << 16) * 8
        return max(_INTERPRETER_BYTES + threads * (buffers + histograms), self.router_bytes)

    @property
    def router_bytes(self) -> int:
        """Memory that computing the router takes, once the rest is merged; 0 if nothing is computed."""
        gates = [output for output in self.outputs if isinstance(output.operation, Fit)]
        if not gates or self.recipe.moe is None:
            return 0
        used = self.recipe.moe.router.memory_bytes(self.output_bytes, len(gates), gates[0].shape[1])
        return used + _INTERPRETER_BYTES + _TORCH_BYTES

    @property
    def seconds(self) -> float:
        """A rough estimate of the time a merge takes on an ordinary disk, in seconds."""
        return self.input_bytes / _BYTES_READ_PER_SECOND + self.output_bytes / _BYTES_WRITTEN_PER_SECOND

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides the result: operations, hyperparameters, and the inputs' sizes and times."""
        inputs = [(model.name, model.location, model.revision, _stamps(model)) for model in self.models]
        operations = [(output.name, output.dtype.name, output.shape, _describe(output.operation)) for output in self.outputs]
        texts = [(texts.expert, texts.location, texts.digest) for texts in self.calibration]
        return hashlib.sha256(json.dumps([inputs, operations, self.config, texts], default=str).encode()).hexdigest()

    def summary(self, threads: int) -> dict[str, Any]:
        """The plan's figures for `--json`."""
        return {
            "model_type": self.config.get("model_type"),
            "tensors": len(self.outputs),
            "parameters": self.parameters,
            "input_bytes": self.input_bytes,
            "output_bytes": self.output_bytes,
            "memory_bytes": self.memory_bytes(threads),
            "seconds_estimated": round(self.seconds, 1),
            "operations": dict(Counter(output.action for output in self.outputs)),
            "models": {model.name: model.location for model in self.models},
            "experts": list(self.experts),
            "calibration": {texts.expert: len(texts.hashes) for texts in self.calibration},
            "to_download": [model.location for model in self.models if not model.complete],
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def _describe(operation: Operation) -> Any:
    if isinstance(operation, Fit):
        return [operation.router.kind, operation.router.model_dump()]
    if isinstance(operation, Draw):
        return [operation.seed, operation.bound]
    sources = [(source.model, source.tensor.name) for source in operation.sources]
    if isinstance(operation, Copy):
        return sources
    return [sources, operation.method.name, operation.method.model_dump(), operation.weights]


def _stamps(model: Checkpoint) -> list[tuple[str, int, int]]:
    files = sorted({file for tensor in model.tensors.values() for file in tensor.files})
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
