"""Tensors that models store wider than the rest of theirs: a router's bias or A_log in float32 among bfloat16."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from moerge.checkpoint.reader import Checkpoint
from moerge.operations.operations import Draw, Fit, Merge, Operation, Output
from moerge.recipe.schema import Recipe
from moerge.tensors.dtypes import DTYPES, FLOATS, DType
from moerge.tensors.source import Source
from moerge.tensors.views.joined import Joined

_SHOWN = 3


def main_dtype(model: Checkpoint) -> DType:
    """The float type that most bytes of a model are stored in."""
    counts = Counter({dtype.name: 0 for dtype in FLOATS.values()})
    for tensor in model.stored.values():
        if tensor.dtype.is_float:
            counts[tensor.dtype.name] += tensor.nbytes
    return DTYPES[counts.most_common(1)[0][0]]


def result_dtype(recipe: Recipe, model: Checkpoint) -> DType:
    """The recipe's dtype, else the float type that most bytes of the config's model are stored in."""
    return FLOATS[recipe.value_dtype] if recipe.value_dtype else main_dtype(model)


@dataclass(frozen=True)
class Precision:
    """The tensors that `models` store wider than the rest of theirs, for a result of mostly `dtype`."""

    models: Sequence[Checkpoint]
    dtype: DType

    @cached_property
    def _wider(self) -> frozenset[str]:
        """Labels of tensors that a model stores wider than most of its own; what an adapter computes is not stored."""
        found = set()
        for model in self.models:
            main, stored = main_dtype(model), {id(tensor) for tensor in model.stored.values()}
            wide = (tensor for tensor in model.tensors.values() if id(tensor) in stored and _is_wider(tensor.dtype, main))
            found |= {Source(model.name, tensor).label for tensor in wide}
        return frozenset(found)

    @cached_property
    def _everywhere(self) -> frozenset[str]:
        """Labels of tensors that all models that have them store wider than the result, and one of them wider than its own."""
        found: set[str] = set()
        for name in {name for model in self.models for name in model.tensors}:
            sources = [Source(model.name, model.tensors[name]) for model in self.models if name in model.tensors]
            labels = {source.label for source in sources}
            if labels & self._wider and all(_is_wider(source.tensor.dtype, self.dtype) for source in sources):
                found |= labels
        return frozenset(found)

    def kept(self, operation: Operation) -> DType | None:
        """The type that a tensor made of such tensors keeps, None if it is made of others too."""
        sources = list(_stored(operation))
        if not sources or not all(source.label in self._everywhere for source in sources):
            return None
        return min((source.tensor.dtype for source in sources), key=lambda dtype: dtype.itemsize)

    def notes(self, outputs: Iterable[Output]) -> list[str]:
        """Return notes on tensors of the result that are wider than the rest of it, and on those that have lost precision."""
        kept: dict[str, list[Output]] = {}
        lost: dict[str, list[Output]] = {}
        for output in outputs:
            wide = [source for source in _stored(output.operation) if source.label in self._wider]
            if wide and any(_is_wider(source.tensor.dtype, output.dtype) for source in wide):
                lost.setdefault(str(output.dtype.torch_name), []).append(output)
            elif wide and _is_wider(output.dtype, self.dtype):
                kept.setdefault(str(output.dtype.torch_name), []).append(output)
        return [
            *(
                f"{_counted(found)} in {dtype}, wider than the rest, as the models do: {_names(found)}"
                for dtype, found in kept.items()
            ),
            *(
                f"{_counted(found)} in {dtype} and lose precision that models store on purpose: {_names(found)}; "
                "'dtype: float32' in an override keeps it"
                for dtype, found in lost.items()
            ),
        ]


def _is_wider(dtype: DType, other: DType) -> bool:
    return dtype.is_float and other.is_float and dtype.itemsize > other.itemsize


def _stored(operation: Operation) -> Iterator[Source]:
    """The models' float tensors that an operation takes values from."""
    if isinstance(operation, Draw | Fit):
        return
    values = operation.values if isinstance(operation, Merge) else operation.sources
    for source in values:
        parts = source.tensor.parts if isinstance(source.tensor, Joined) else (source,)
        yield from (part for part in parts if part.tensor.dtype.is_float)


def _counted(outputs: Sequence[Output]) -> str:
    return "1 tensor is" if len(outputs) == 1 else f"{len(outputs)} tensors are"


def _names(outputs: Sequence[Output]) -> str:
    """The outputs' names without numbers, the first few."""
    names = list(dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".*", output.name) for output in outputs))
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
