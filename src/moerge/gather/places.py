"""The places of a model's parameters in its checkpoint: under other names, in parts, transposed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moerge.tensors.tensor import Tensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Place:
    """A parameter and the tensors `stored` of it. `split` makes those of whatever has the parameter's shape, by name."""

    parameter: Any
    stored: tuple[str, ...]
    split: Callable[[torch.Tensor], Mapping[str, torch.Tensor]]

    @property
    def whole(self) -> str | None:
        """The tensor that is this parameter as it is, None where they differ."""
        return self.stored[0] if len(self.stored) == 1 else None


def places_of(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """The parameters, by their names in memory, that the checkpoint has `tensors` for."""
    found = {}
    for name, parameter in model.named_parameters():
        place = _renamed(model, name, parameter, tensors) or _converted(model, name, parameter, tensors)
        if place is not None:
            found[name] = place
    return found


def _renamed(model: Any, name: str, parameter: Any, tensors: Mapping[str, Tensor]) -> Place | None:
    """Under its own name, or with or without the prefix of the headless model."""
    prefix = f"{model.base_model_prefix}."
    for stored in (name, name.removeprefix(prefix), prefix + name):
        if stored in tensors and tensors[stored].shape == tuple(parameter.shape):
            return Place(parameter, (stored,), lambda values, stored=stored: {stored: values})  # type: ignore[misc]
    return None


def _converted(model: Any, name: str, parameter: Any, tensors: Mapping[str, Tensor]) -> Place | None:
    """Return the state dict as transformers 5 would save it: it fuses the experts of a MoE when it loads one, and renames
    what old files have.
    """
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 keeps what it loads as it is stored
        return None

    def split(values: torch.Tensor) -> Mapping[str, torch.Tensor]:
        saved: Mapping[str, torch.Tensor] = revert_weight_conversion(model, {name: values})
        return saved

    try:
        shapes = {stored: tuple(part.shape) for stored, part in split(torch.empty(parameter.shape, device="meta")).items()}
    except Exception:  # a conversion that takes several parameters at once; then there is no statistic
        return None
    if not all(stored in tensors and tensors[stored].shape == shape for stored, shape in shapes.items()):
        return None
    return Place(parameter, tuple(shapes), split)
