"""What the assemblers of all kinds of result share: from a recipe's models to operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moerge.architecture import Expected, Family
from moerge.checkpoint.dtypes import DType
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.methods.method import MergeMethod
from moerge.planning.match import MethodChooser
from moerge.planning.operations import Copy, Merge, Operation, Output, Source
from moerge.recipe.schema import Recipe


@dataclass(frozen=True)
class Assembled:
    """The result's config.json and tensors; `experts` are its experts' names by index, none in a dense model."""

    config: Mapping[str, Any]
    outputs: Sequence[Output]
    experts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assembly:
    """The models by name, `candidates` that they have in common, and what the result's tensors are made of.

    `source` names the model whose config is used.
    """

    recipe: Recipe
    models: Mapping[str, Checkpoint]
    family: Family | None
    dtype: DType
    candidates: Sequence[Expected]
    source: str

    def output(self, tensor: Expected, operation: Operation) -> Output:
        """A tensor of the result. Bytes that are only copied keep their element type."""
        dtype = operation.source.tensor.dtype if isinstance(operation, Copy) else self.dtype
        return Output(tensor.name, tensor.role, dtype, tensor.shape, operation)

    def copied(self, model: str, name: str) -> Operation:
        """A model's tensor: its bytes, or its values rounded to the output's type."""
        source = self._source(model, name)
        if source.tensor.dtype is self.dtype or not source.tensor.dtype.is_float:
            return Copy(source)
        return Merge(Average(), (source,), (1.0,))

    def merged(self, tensor: Expected, chooser: MethodChooser, members: tuple[str, ...]) -> Operation:
        """A merge over `members`; the base has no task vector, so methods that work on those leave it out."""
        if not self._source(self.source, tensor.name).tensor.dtype.is_float:
            return self.copied(self.source, tensor.name)
        method = chooser.choose(tensor.role, tensor.name)
        base = None
        if method.uses_task_vectors:
            members = tuple(name for name in members if name != "base")
            base = self._source("base", tensor.name)
        self._check_count(method, members)
        weights = tuple(self.recipe.experts[name].weight if name in self.recipe.experts else 1.0 for name in members)
        return Merge(method, tuple(self._source(name, tensor.name) for name in members), weights, base)

    def _source(self, model: str, name: str) -> Source:
        return Source(model, self.models[model].tensors[name])

    def _check_count(self, method: MergeMethod, members: Sequence[str]) -> None:
        if method.exact_experts not in (None, len(members)):
            raise InputError(
                f"{self.recipe.source}: {method.name} merges exactly {method.exact_experts} models, "
                f"not {len(members)} ({', '.join(members)})"
            )
