"""A tensor of one of the models that are merged."""

from __future__ import annotations

from dataclasses import dataclass

from moerge.tensors.tensor import Tensor


@dataclass(frozen=True)
class Source:
    """A tensor of one of the models, by the name the recipe gives the model."""

    model: str
    tensor: Tensor

    @property
    def label(self) -> str:
        """ "model:tensor", by which digests and messages call it."""
        return f"{self.model}:{self.tensor.name}"
