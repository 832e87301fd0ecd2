"""The plan: everything that will happen, known before any tensor is read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moerge.architecture import Family
from moerge.architecture.heterogeneous import expert_number
from moerge.checkpoint.reader import Checkpoint
from moerge.execution.float8 import BLOCK as BLOCK_ROWS
from moerge.execution.float8 import Float8Pair
from moerge.files import SourceFile
from moerge.formatting import Displayed, as_count, as_size
from moerge.operations.estimate import region_memory
from moerge.operations.fitter import MODULE, Fitter, MoESize
from moerge.operations.operations import Copy, Draw, Fit, FitJob, Operation, Output, fit_jobs
from moerge.planning.float8 import float8_pairs
from moerge.recipe.schema import FLOAT8, Recipe
from moerge.statistics.files import Used
from moerge.tensors.digest import file_digest
from moerge.tensors.dtypes import F32
from moerge.tensors.spec import TensorSpec
from moerge.tensors.streams import BLOCK, WINDOW
from moerge.texts import Texts

_MOST_SETTINGS = 12
"""Settings of one operation that are listed one by one."""
_INTERPRETER_BYTES = 150_000_000
_TORCH_BYTES, _TORCH_SECONDS = 500_000_000, 5.0
"""What torch and transformers take before they do anything."""
_BYTES_READ_PER_SECOND = 2e9
_BYTES_WRITTEN_PER_SECOND = 0.5e9
"""What an ordinary SSD does, for the estimate of time; a cold or busy disk is slower."""
_OPERATIONS_PER_SECOND, _OPERATIONS_PER_SECOND_ON_A_DEVICE = 2e11, 2e13
"""What a desktop's cores compute together in float32, and what a GPU does. Four cores do half of it, bfloat16 on a processor
without instructions for it a sixth."""


@dataclass(frozen=True)
class Account:
    """The making of a result that is no merge of experts: title and text of the card, and the manifest's `facts` at `key`."""

    title: str
    paragraphs: tuple[str, ...]
    key: str
    facts: Mapping[str, Any]


@dataclass(frozen=True, repr=False)
class Plan(Displayed):
    """Outputs in order, with the config and files that go beside them.

    `models` holds the base first, where there is one, and `family` is theirs; `experts` names the MoE's experts in the order of
    their indices, and is empty for a dense merge. `vocabulary` says where the tokens come from. What is said about clients is
    not part of the result: its files do not depend on who was asked about. `account` replaces what the card says of merging.
    """

    recipe: Recipe
    models: tuple[Checkpoint, ...]
    outputs: tuple[Output, ...]
    config: Mapping[str, Any]
    files: Mapping[str, bytes]
    experts: tuple[str, ...] = ()
    vocabulary: Mapping[str, Any] = field(default_factory=dict)
    calibration: tuple[Texts, ...] = ()
    statistics: tuple[Used, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    client_warnings: tuple[str, ...] = ()
    client_notes: tuple[str, ...] = ()
    family: Family | None = None
    account: Account | None = None

    def headline(self) -> str:
        """Kind, parameters and bytes of the result."""
        kind = f"MoE of {len(self.experts)} experts" if self.experts else "dense model"
        return f"{kind}, {as_count(self.parameters)} parameters, {as_size(self.output_bytes)}, {len(self.warnings)} warnings"

    def figures(self) -> Mapping[str, Any]:
        """The operations: tensors and bytes of each."""
        return {
            f"{row['action']} {row['hyperparameters']}".strip(): f"{row['tensors']} tensors, {as_size(row['bytes'])}"
            for row in self.operations
        }

    @property
    def sources(self) -> tuple[SourceFile, ...]:
        """All files that tensors are read from."""
        read = (*(model.files for model in self.models), *(used.statistics.files for used in self.statistics))
        return tuple(dict.fromkeys(file for files in read for file in files))

    @property
    def complete(self) -> bool:
        """Return whether all inputs are on this machine; Hub models that are not will be downloaded before merging."""
        return all(model.complete for model in self.models)

    @property
    def commits(self) -> dict[str, str | None]:
        """The Hub commits that were looked at, by model."""
        return {name: commit for model in self.models for name, commit in model.commits.items()}

    @cached_property
    def parameters(self) -> int:
        """Parameters of the result."""
        return sum(output.size for output in self.outputs)

    @cached_property
    def float8(self) -> Mapping[str, Float8Pair]:
        """The outputs that are stored as codes with scales, by name."""
        return float8_pairs(self.outputs) if self.recipe.dtype == FLOAT8 else {}

    @cached_property
    def stored(self) -> tuple[TensorSpec, ...]:
        """The tensors in the result's files."""
        pairs = ((output, self.float8.get(output.name)) for output in self.outputs)
        return tuple(spec for output, pair in pairs for spec in ((pair.codes, pair.scales) if pair else (output,)))

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of tensors written."""
        return sum(tensor.nbytes for tensor in self.stored)

    @cached_property
    def input_bytes(self) -> int:
        """Bytes of distinct tensors read."""
        return sum({(s.model, s.tensor.name): s.tensor.nbytes for o in self.outputs for s in o.operation.sources}.values())

    @cached_property
    def work_bytes(self) -> int:
        """Bytes read and written by all passes, what progress counts."""
        return sum(output.work_bytes for output in self.outputs)

    def memory_bytes(self, threads: int) -> int:
        """An upper estimate of the working memory in bytes: blocks for each thread, whole tensors, and Python itself."""
        return max(_INTERPRETER_BYTES + self.merging_bytes(threads), self.fitting_bytes(threads))

    def merging_bytes(self, threads: int) -> int:
        """Return the part of it that merging takes."""
        sources = max((len(output.operation.sources) for output in self.outputs), default=1)
        buffers = (sources + 1) * (WINDOW + BLOCK) * F32.itemsize
        histograms = 2 * sources * (1 << 16) * 8
        merging = threads * (buffers + histograms) + region_memory(self.outputs, threads)
        stripes = [BLOCK_ROWS * output.shape[1] * F32.itemsize for output in self.outputs if output.name in self.float8]
        merging += 4 * threads * max(stripes, default=0)
        return merging + sum(model.working_bytes for model in self.models)

    @cached_property
    def operations(self) -> tuple[dict[str, Any], ...]:
        """Outputs that come about alike, counted: `action`, `hyperparameters`, `tensors`, and `bytes` written.

        Settings that are others for every tensor make one group.
        """
        settings: dict[str, dict[str, None]] = {}
        for output in self.outputs:
            settings.setdefault(output.action, {})[output.hyperparameters] = None
        many = {action: found for action, found in settings.items() if len(found) > _MOST_SETTINGS}
        groups: dict[tuple[str, str], list[int]] = {}
        for output in self.outputs:
            found = many.get(output.action)
            one = f"{len(found)} different settings, such as {next(iter(found))}" if found else output.hyperparameters
            groups.setdefault((output.action, one), []).append(output.nbytes)
        keys = ("action", "hyperparameters", "tensors", "bytes")
        return tuple(dict(zip(keys, (*group, len(sizes), sum(sizes)), strict=True)) for group, sizes in groups.items())

    @cached_property
    def fit_jobs(self) -> tuple[FitJob, ...]:
        """Return what is computed once the rest is merged, in order."""
        return fit_jobs(self.outputs)

    def _size(self, fitting: FitJob) -> MoESize:
        """The size of the model, of which some outputs are still to be fitted."""
        outputs = fitting.outputs
        experts, hidden = outputs[0].shape[0], outputs[0].shape[-1]
        separate = sum(output.size for output in self.outputs if MODULE.search(output.role))
        vocabulary = int(self.config.get("vocab_size") or 0)
        shared = self.parameters - separate
        loaded = self._loaded_bytes(fitting.fitter)
        return MoESize(loaded, len(outputs), hidden, vocabulary, experts, shared, separate // experts)

    def _loaded_bytes(self, fitter: Fitter) -> int:
        """Return the bytes of the merged model that are loaded where a fitter runs it: everything, or the largest expert and
        what is shared.
        """
        if not fitter.runs_one_expert:
            return self.output_bytes
        sizes: Counter[int | None] = Counter()
        for output in self.outputs:
            sizes[expert_number(output.name)] += output.nbytes
        return sizes.pop(None, 0) + max(sizes.values())

    def fitting_bytes(self, threads: int = 1, *, title: str = "") -> int:
        """Memory that computing takes what is computed once the rest is merged; 0 if nothing is. `title`: of that alone."""
        every = [fitting for fitting in self.fit_jobs if title in ("", fitting.fitter.title)]
        needed = [
            fitting.fitter.memory_bytes(self._size(fitting), threads) + _TORCH_BYTES * fitting.fitter.needs_torch
            for fitting in every
        ]
        return max(needed) + _INTERPRETER_BYTES if needed else 0

    @property
    def fitting_seconds(self) -> float:
        """A very rough estimate of the time that this takes, in seconds."""
        return sum(self._seconds_of(fitting) for fitting in self.fit_jobs)

    def _seconds_of(self, fitting: FitJob) -> float:
        fitter = fitting.fitter
        speed = _OPERATIONS_PER_SECOND if getattr(fitter, "device", "cpu") == "cpu" else _OPERATIONS_PER_SECOND_ON_A_DEVICE
        loaded = self._loaded_bytes(fitter)
        loading = _TORCH_SECONDS + loaded / _BYTES_READ_PER_SECOND if fitter.runs_model else 0.0
        return loading + fitter.operations(self._size(fitting), self.calibration) / speed

    @property
    def seconds(self) -> float:
        """A rough estimate of the time a merge takes on an ordinary disk, fitting included, in seconds."""
        merging = self.input_bytes / _BYTES_READ_PER_SECOND + self.output_bytes / _BYTES_WRITTEN_PER_SECOND
        return merging + self.fitting_seconds

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that decides the result: operations, hyperparameters, and the inputs' sizes and times."""
        inputs = [model.identity for model in self.models]
        operations = [(output.name, output.dtype.name, output.shape, describe(output.operation)) for output in self.outputs]
        texts = [(texts.expert, texts.location, texts.digest) for texts in self.calibration]
        statistics = [(used.model, *file.identity) for used in self.statistics for file in used.statistics.files]
        files = {name: file_digest(content) for name, content in self.files.items()}
        whole = [inputs, operations, self.config, texts, statistics, files, self.vocabulary]
        return hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()

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
            "fitting_seconds_estimated": round(self.fitting_seconds, 1),
            "operations": dict(Counter(output.action for output in self.outputs)),
            "models": {model.name: model.location for model in self.models},
            "experts": list(self.experts),
            "vocabulary": dict(self.vocabulary),
            "calibration": {texts.expert: len(texts.hashes) for texts in self.calibration},
            "to_download": [model.location for model in self.models if not model.complete],
            "notes": [*self.notes, *self.client_notes],
            "warnings": [*self.warnings, *self.client_warnings],
        }


def describe(operation: Operation) -> Any:
    """All that decides what an operation computes, but for the content of its sources; it can be written as JSON."""
    if isinstance(operation, Fit):
        return [operation.fitter.kind, operation.fitter.settings]
    if isinstance(operation, Draw):
        return [operation.seed, operation.bound]
    sources = [(source.model, source.tensor.name) for source in operation.sources]
    if isinstance(operation, Copy):
        return sources
    return [sources, operation.method.name, operation.method.model_dump(), operation.weights]
