"""What a fitter has to work with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moerge.architecture.family import Family
from moerge.calibration import Texts
from moerge.checkpoint.digest import combined_digest
from moerge.checkpoint.reader import Checkpoint
from moerge.moe.router import MODULE
from moerge.planning.operations import Output, Source
from moerge.planning.reading import Stream


@dataclass(frozen=True)
class FitContext:
    """A merged model that is complete but for what is still to be fitted, of which `outputs` are this fitter's, in order.

    `folder` loads with transformers. Of a router the outputs are its gates, by layer, and `experts` the names of their rows.
    `digests` are those of what is not fitted, by role. `models` are the inputs by name, all of `family`. Relative paths start
    from `relative_to`. What `read` returned is in `read_digests`, for the manifest. `threads` may be used, whose number must
    not change the results; `advance(count)` is told of texts that are done.
    """

    folder: Path
    outputs: tuple[Output, ...]
    experts: tuple[str, ...]
    texts: Mapping[str, Texts] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, Checkpoint] = field(default_factory=dict)
    family: Family | None = None
    relative_to: Path = Path()
    read_digests: dict[str, str] = field(default_factory=dict)
    threads: int = 1
    advance: Callable[[int], None] = lambda count: None

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
        """Whether an input has a tensor of this role."""
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
