"""What the assemblers of all kinds of result share: from a recipe's models to operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moerge.architecture import Expected, Family
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.methods.method import MergeMethod, cancel
from moerge.methods.passthrough import Passthrough
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.operations import Copy, Merge, Operation, Output
from moerge.planning.match import MethodChooser
from moerge.planning.statistics import Binder
from moerge.planning.vocab.alignment import Alignment
from moerge.recipe.rules import Place
from moerge.recipe.schema import Recipe
from moerge.tensors.dtypes import DType
from moerge.tensors.source import Source
from moerge.tensors.views.joined import joined


@dataclass(frozen=True)
class Assembled:
    """The result's config.json and tensors; `experts` are its experts' names by index, none in a dense model.

    `warnings` are what its user should know, `notes` what may be of interest.
    """

    config: Mapping[str, Any]
    outputs: Sequence[Output]
    experts: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Assembly:
    """The models by name, `candidates` that they have in common, and what the result's tensors are made of.

    `source` names the model whose config is used. Without a `binder` methods do not get the statistics that they need. The
    models have the same vocabulary; where that took an `alignment`, it knows their own rows.
    """

    recipe: Recipe
    models: Mapping[str, Checkpoint]
    family: Family | None
    dtype: DType
    candidates: Sequence[Expected]
    source: str
    binder: Binder | None = None
    alignment: Alignment | None = None

    def output(self, tensor: Expected, operation: Operation) -> Output:
        """A tensor of the result. Bytes that are only copied keep their element type."""
        dtype = operation.source.tensor.dtype if isinstance(operation, Copy) else self.dtype
        return Output(tensor.name, tensor.role, dtype, tensor.shape, operation)

    def copied(self, model: str, name: str) -> Operation:
        """A model's tensor: its bytes, or its values rounded to the output's type."""
        return self.unchanged(self._source(model, name))

    def joined(self, tensor: Expected, models: Sequence[str], names: Sequence[str]) -> Operation:
        """The tensors of these names, of the first model, then of the next, one after the other as one tensor."""
        return self.unchanged(joined(tensor.name, tensor.shape, [self._source(m, name) for m in models for name in names]))

    def unchanged(self, source: Source) -> Operation:
        """A tensor's bytes, or its values rounded to the output's type."""
        if source.tensor.dtype is self.dtype or not source.tensor.dtype.is_float:
            return Copy(source)
        return Merge(Average(), (source,), (1.0,))

    def merged(
        self,
        tensor: Expected,
        chooser: MethodChooser,
        members: tuple[str, ...],
        *,
        place: Place | None = None,
        base: str = "base",
    ) -> Operation:
        """A merge over `members`; the base has no task vector, so methods that work on those leave it out.

        `place` says where the tensor comes from, if not from the one of its own name in every model.
        """
        if self.family is not None and self.family.is_untabled(tensor.name) and not self._shared(tensor.name):
            return self.copied(next(iter(self.models)), tensor.name)
        place = place or Place(tensor.role, tensor.name)
        names = {model: place.inputs.get(model, tensor.name) for model in (*members, base, self.source)}
        first = members[0] if place.inputs and self.source not in place.inputs else self.source
        if not self._source(first, names[first]).tensor.dtype.is_float:
            return self.copied(first, names[first])
        choice = chooser.choose(place)
        method = choice.method
        if isinstance(method, Passthrough):
            return self.copied(method.model, names.get(method.model, tensor.name))
        base_source = None
        if method.uses_task_vectors:
            members, base_source = tuple(name for name in members if name != base), self._own(base, names[base])
            if not members:
                return self.copied(base, names[base])
        self._check_count(method, members)
        method = method.for_experts(members)
        weights = tuple(choice.weights.get(name, 1.0) for name in members)
        if method.divides_by_weights and cancel(weights):
            raise InputError(f"{self.recipe.source}: tensor {tensor.name!r}: the weights sum to zero: they cannot be normalised")
        merge = Merge(method, tuple(self._own(name, names[name]) for name in members), weights, base_source)
        merge = self.binder.bind(merge) if self.binder and isinstance(method, StatisticsMethod) else merge
        has_tokens = self.alignment is not None and tensor.name in self.alignment.names
        return self.alignment.aligned(merge, tensor.name) if self.alignment and has_tokens else merge

    def _own(self, model: str, name: str) -> Source:
        """A model's tensor with the rows that it has itself."""
        models = self.models if self.alignment is None else self.alignment.models
        return Source(model, models[model].tensors[name])

    def _source(self, model: str, name: str) -> Source:
        return Source(model, self.models[model].tensors[name])

    def _shared(self, name: str) -> bool:
        return len({model.tensors[name].shape if name in model.tensors else None for model in self.models.values()}) == 1

    def _check_count(self, method: MergeMethod, members: Sequence[str]) -> None:
        if method.exact_experts not in (None, len(members)):
            models = f"{method.exact_experts} model{'s' if method.exact_experts != 1 else ''}"
            raise InputError(
                f"{self.recipe.source}: {method.name} merges exactly {models}, not {len(members)} ({', '.join(members)})"
            )
