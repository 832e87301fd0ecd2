"""Integer tensors, which no method merges: one model's are taken, and a warning says where the others' differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from moerge.operations.operations import Copy, Output
from moerge.planning.plan import Plan
from moerge.tensors.streams import same_values
from moerge.tensors.tensor import Tensor


def unlike_integers(plan: Plan) -> Iterator[str]:
    """A warning for each tensor of integers that is one model's while another model has other values.

    It reads these tensors, which are few and small in what people merge: positions, masks.
    """
    copied = [(output, output.operation.source) for output in plan.outputs if isinstance(output.operation, Copy)]
    copies = Counter(source.tensor.name for _, source in copied)
    for output, source in copied:
        if not output.dtype.is_float and copies[source.tensor.name] == 1:  # else every expert keeps its own
            yield from _unlike(plan, output, source.model, source.tensor)


def _unlike(plan: Plan, output: Output, chosen: str, tensor: Tensor) -> Iterator[str]:
    others = [(model.name, model.tensors.get(tensor.name)) for model in plan.models if model.name != chosen]
    names = [name for name, other in others if other is not None and not _equal(tensor, other)]
    if names:
        yield (
            f"tensor {output.name!r} holds whole numbers, which are not merged: it is that of {chosen}, "
            f"and {', '.join(names)} {'has another one' if len(names) == 1 else 'have other ones'}"
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype is other.dtype and same_values(one, other)
