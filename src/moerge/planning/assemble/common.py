"""The base of the assemblers of all kinds of result: from a recipe's models to operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moerge.architecture import ExpectedTensor
from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.methods.method import MergeMethod, cancel
from moerge.methods.passthrough import Passthrough
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.operations import Copy, Merge, Operation, Output
from moerge.planning.models import SourceModel
from moerge.planning.precision import Precision
from moerge.planning.resolver import MethodResolver
from moerge.planning.statistics import Binder
from moerge.planning.vocab.alignment import Alignment
from moerge.planning.vocab.match import ResolvedVocabulary
from moerge.recipe.rules import MethodChoice, TensorContext
from moerge.recipe.schema import Recipe
from moerge.statistics.files import Used
from moerge.tensors.dtypes import FLOATS, DType
from moerge.tensors.source import Source
from moerge.tensors.views.joined import joined
from moerge.tensors.views.span import SpanTensor, same_elements


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
class Draft:
    """Everything of a plan that depends on its kind. `files` are those beside tensors, config and tokenizer."""

    assembled: Assembled
    models: tuple[SourceModel, ...]
    vocabulary: ResolvedVocabulary
    warnings: Sequence[str]
    notes: Sequence[str]
    files: Mapping[str, bytes] = field(default_factory=dict)
    statistics: tuple[Used, ...] = ()


@dataclass(frozen=True)
class Assembly:
    """The models by name, `candidates` that they have in common, and what the result's tensors are made of.

    `source` names the model whose config is used. Without a `binder` methods do not get the statistics that they need. The
    models have the same vocabulary, and `owners` what is one model's; where that took an `alignment`, it knows their own rows.
    """

    recipe: Recipe
    models: Mapping[str, SourceModel]
    dtype: DType
    candidates: Sequence[ExpectedTensor]
    source: str
    binder: Binder | None = None
    alignment: Alignment | None = None
    owners: Mapping[str, str] = field(default_factory=dict)

    @property
    def leader(self) -> SourceModel:
        """The model whose config is used."""
        return self.models[self.source]

    @cached_property
    def resolver(self) -> MethodResolver:
        """The recipe's rules."""
        return MethodResolver(self.recipe)

    @cached_property
    def precision(self) -> Precision:
        """Return the tensors that the models store wider than the rest."""
        models = self.models if self.alignment is None else self.alignment.models
        return Precision(tuple(model.checkpoint for model in models.values()), self.dtype)

    def output(self, tensor: ExpectedTensor, operation: Operation) -> Output:
        """A tensor of the result. What is copied into another element type than its own is rounded to it."""
        dtype = self._dtype(tensor, operation)
        if isinstance(operation, Copy):
            stored = operation.source.tensor.dtype
            if not stored.is_float:
                dtype = stored
            elif stored is not dtype:
                operation = Merge(Average(), (operation.source,), (1.0,))
        return Output(tensor.name, tensor.role, dtype, tensor.shape, operation)

    def _dtype(self, tensor: ExpectedTensor, operation: Operation) -> DType:
        """Choose the element type: an override's, else the recipe's, else the wider one that all models store it in, else the
        result's.
        """
        roles = dict.fromkeys((tensor.role, tensor.dense_role))
        asked = next(
            filter(None, (self.resolver.dtype(TensorContext(role, tensor.name)) for role in roles)), self.recipe.value_dtype
        )
        return FLOATS[asked] if asked else self.precision.kept(operation) or self.dtype

    def copied(self, model: str, name: str) -> Operation:
        """A model's tensor."""
        return Copy(self._source(model, name))

    def joined(self, tensor: ExpectedTensor, models: Sequence[str], names: Sequence[str]) -> Operation:
        """The tensors of these names, of the first model, then of the next, one after the other as one tensor."""
        return Copy(joined(tensor.name, tensor.shape, [self._source(m, name) for m in models for name in names]))

    def merged(
        self,
        tensor: ExpectedTensor,
        members: tuple[str, ...],
        *,
        context: TensorContext | None = None,
        base: str = "base",
    ) -> Operation:
        """A merge over `members`; the base has no task vector, so methods that work on those leave it out.

        `context` says where the tensor comes from, if not from the one of its own name in every model.
        """
        context = context or TensorContext(tensor.role, tensor.name)
        if tensor.name in self.owners:
            return self._taken(context)
        first = members[0] if context.inputs and self.source not in context.inputs else self.source
        if not self._source(first, context.name_in(first)).tensor.dtype.is_float:
            return self.copied(first, context.name_in(first))
        choice = self.resolver.choose(context)
        members = choice.members or members
        if isinstance(choice.method, Passthrough):
            return self.copied(choice.method.model, context.name_in(choice.method.model))
        if choice.method.uses_task_vectors:
            members = tuple(name for name in members if name != base)
            if not members:
                return self.copied(base, context.name_in(base))
        merge = self._merge(context, choice, members, base)
        if _is_one_tensor(merge) and not (self.alignment and tensor.name in self.alignment.names):
            return Copy(merge.experts[0])
        return self._completed(merge, tensor.name)

    def _merge(self, context: TensorContext, choice: MethodChoice, members: tuple[str, ...], base: str) -> Merge:
        """The models' own tensors, merged by the method that was chosen."""
        method = choice.method
        self._check_count(method, members)
        weights = tuple(choice.weights.get(name, 1.0) for name in members)
        if method.divides_by_weights and cancel(weights):
            raise InputError(f"{self.recipe.source}: tensor {context.name!r}: the weights sum to zero: they cannot be normalized")
        experts = tuple(self._own(name, context.name_in(name)) for name in members)
        base_source = self._own(base, context.name_in(base)) if method.uses_task_vectors else None
        return Merge(method.for_experts(members).for_role(context.role), experts, weights, base_source)

    def _completed(self, merge: Merge, name: str) -> Merge:
        """The merge with the statistics that its method needs, and with the result's rows where these are tokens."""
        if self.binder and isinstance(merge.method, StatisticsMethod):
            merge = self.binder.bind(merge)
        return self.alignment.aligned(merge, name) if self.alignment and name in self.alignment.names else merge

    def _own(self, model: str, name: str) -> Source:
        """A model's tensor with the rows that it has itself."""
        models = self.models if self.alignment is None else self.alignment.models
        return Source(model, models[model].tensors[name])

    def _source(self, model: str, name: str) -> Source:
        return Source(model, self.models[model].tensors[name])

    def _taken(self, context: TensorContext) -> Operation:
        """A tensor that is one model's: the one that an override passes through, where it has it."""
        method = self.resolver.choose(context).method
        named = method.model if isinstance(method, Passthrough) else ""
        has_it = named in self.models and context.name in self.models[named].tensors
        return self.copied(named if has_it else self.owners[context.name], context.name)

    def _check_count(self, method: MergeMethod, members: Sequence[str]) -> None:
        if method.exact_experts not in (None, len(members)):
            models = f"{method.exact_experts} model{'s' if method.exact_experts != 1 else ''}"
            raise InputError(
                f"{self.recipe.source}: {method.name} merges exactly {models}, not {len(members)} ({', '.join(members)})"
            )


def _is_one_tensor(merge: Merge) -> bool:
    """Return whether a merge is of one mixture's tensor with itself, which changes nothing, rounding included."""
    first, *others = merge.values
    keeps = merge.method.uses_task_vectors or merge.method.divides_by_weights or isinstance(merge.method, Average)
    return isinstance(first.tensor, SpanTensor) and keeps and all(same_elements(first.tensor, s.tensor) for s in others)
