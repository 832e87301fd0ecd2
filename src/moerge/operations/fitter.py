"""Fitters: compute tensors that depend on the rest of the merged model, such as routers and projectors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from moerge.architecture.family import Family
from moerge.checkpoint.reader import Checkpoint
from moerge.tensors.digest import combined_digest
from moerge.tensors.source import Source
from moerge.tensors.spec import TensorSpec
from moerge.tensors.streams import Stream
from moerge.texts import TextRequest, Texts

Unit = Literal["texts", "tokens"]
"""What is counted while something is computed."""


MODULE = re.compile(r"\.ffn\.(\d+)\.")
"""The number of the expert in a role such as `layers.3.ffn.1.up`."""


@dataclass(frozen=True)
class MoESize:
    """The size of a merged model: `shared` and `module` count the parameters of the backbone and of one expert's modules.

    `nbytes` are those of what is loaded where it runs. `layers` is how many gates are computed, `experts` and `hidden` are the
    rows and columns of each.
    """

    nbytes: int
    layers: int
    hidden: int
    vocabulary: int
    experts: int
    shared: int
    module: int


@dataclass(frozen=True)
class FitContext:
    """A merged model that is complete but for what is still to be fitted, of which `outputs` are this fitter's, in order.

    `folder` loads with transformers. Of a router the outputs are its gates, by layer, and `experts` the names of their rows.
    `digests` are those of what is not fitted, by role. `models` are the inputs by name, all of `family`. Relative paths start
    from `relative_to`. What `read` returned is in `read_digests`, for the manifest. `threads` may be used, whose number must
    not change the results; `advance(count)` is told of texts that are done. `gate` is what makes weights of logits.
    """

    folder: Path
    outputs: tuple[TensorSpec, ...]
    experts: tuple[str, ...]
    texts: Mapping[str, Texts] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Checkpoint] = field(default_factory=dict)
    family: Family | None = None
    relative_to: Path = Path()
    read_digests: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    advance: Callable[[int], None] = lambda count: None
    gate: Literal["softmax", "sigmoid"] = "softmax"

    def model_digest(self, expert: int | None) -> str:
        """Digest of all tensors that take part when every token goes to one expert; to all of them for None."""
        used = {}
        for role, digest in self.digests.items():
            module = MODULE.search(role)
            if module is None or expert is None:
                used[role] = digest
            elif int(module[1]) == expert:  # by what it is, not by its place among the experts
                used[MODULE.sub(".ffn.", role)] = digest
        return combined_digest(used)

    def has(self, model: str, role: str) -> bool:
        """Return whether an input has a tensor of this role."""
        return any(self.family is not None and self.family.role_of(name) == role for name in self.models[model].tensors)

    def read(self, model: str, role: str) -> np.ndarray:
        """A tensor of an input by its role, as float32; InputError if it holds NaN or infinity."""
        assert self.family is not None
        stored = self.models[model].tensors.values()
        tensor = next(tensor for tensor in stored if self.family.role_of(tensor.name) == role)
        source, values_N = Source(model, tensor), np.empty(tensor.size, np.float32)
        stream = Stream(source)
        stream.fill_finite(values_N)
        self.read_digests[source.label] = stream.digest()
        return values_N.reshape(tensor.shape)


class Fitter:
    """Computes the outputs whose operation is `Fit` with this very object.

    A subclass says in `fit` what they are, in `inputs` what text that takes, and in `memory_bytes` and `operations` what it
    costs. `title` is how the plan calls what is computed, `counts` what progress counts: see `steps`.
    """

    kind: ClassVar[str]
    counts: ClassVar[Unit] = "texts"

    @property
    def title(self) -> str:
        """Return a name for what is computed, as in "the ridge router"."""
        raise NotImplementedError

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the settings that decide the values beside the tensors and texts that are read; shown by the plan."""
        return {}

    @property
    def runs_model(self) -> bool:
        """Return whether the merged model is loaded for it, or an expert of it."""
        return False

    @property
    def runs_one_expert(self) -> bool:
        """Return whether of experts that are whole models only one is loaded at a time."""
        return False

    @property
    def needs_torch(self) -> bool:
        """Return whether torch and transformers are in memory while it works."""
        return True

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The calibration text of the experts, read while planning; InputError if something is missing."""
        return ()

    def require(self) -> None:
        """InputError if a package is not installed that this needs; asked before anything is written."""

    def memory_bytes(self, size: MoESize, threads: int) -> int:
        """Return the bytes that it holds in memory. `size` is that of the model and of the tensors that are computed."""
        return 0

    def operations(self, size: MoESize, calibration: Sequence[Texts]) -> float:
        """Floating-point operations that it takes, roughly."""
        return 0.0

    def steps(self, calibration: Sequence[Texts]) -> int:
        """Return the number of texts or tokens (whichever it `counts`) of `fit`, which tells `context.advance` of those done."""
        return 0

    def fit(self, context: FitContext) -> Mapping[str, np.ndarray]:
        """float32 arrays of their shapes for all of `context.outputs` by name."""
        raise NotImplementedError

    def remarks(self, context: FitContext) -> tuple[str, ...]:
        """Warnings about what was computed, the same whether `fit` ran now or before an interruption."""
        return ()
