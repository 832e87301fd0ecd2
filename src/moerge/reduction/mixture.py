"""The mixture that is reduced: opened, checked, and the plan of the smaller one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from moerge.architecture import ExpectedTensor
from moerge.architecture.config import normalized_config, portable_config
from moerge.architecture.family import expected_tensors
from moerge.architecture.mixture import expert_count, is_routed, with_experts
from moerge.checkpoint.expert import expert_labels
from moerge.checkpoint.locate import locate
from moerge.checkpoint.quantised import with_numbers
from moerge.errors import InputError
from moerge.methods.average import Linear
from moerge.methods.method import MergeMethod
from moerge.operations.operations import Copy, Fit, Merge, Operation, Output
from moerge.planning.checks import check_present, check_shapes, check_storage, expected_of, relevant
from moerge.planning.merged import merged_tensors
from moerge.planning.models import SourceModel
from moerge.reduction.choice import Choice, LayerChoice
from moerge.reduction.fitter import ReductionFitter
from moerge.reduction.settings import MethodFold, Reduction, ReductionRecipe
from moerge.runtime.layerwise import MixtureTensors
from moerge.tensors.digest import file_digest
from moerge.tensors.source import Source
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.joined import joined
from moerge.tensors.views.rows import RowsTensor

NAME = "model"
"""The mixture's name in messages and in the result's manifest."""
_GROUPED_KEYS = ("n_group", "num_expert_group", "topk_group")
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe")
"""Model types whose layers, routers and gates are known to run here as in transformers."""
_SAMPLE = 4096
"""Elements of each tensor that a mixture is known again by."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """A mixture that can be reduced."""

    model: SourceModel
    labels: tuple[str, ...]

    @cached_property
    def tensors(self) -> MixtureTensors:
        """Its tensors, with the experts among them."""
        assert self.model.family is not None
        return MixtureTensors(self.model.family, self.model.config, self.model.tensors)

    @property
    def layers(self) -> list[int]:
        """The layers with experts."""
        return sorted(self.tensors.routers)

    @property
    def top_k(self) -> int:
        """The experts that each token goes to."""
        return int(self.model.config["num_experts_per_tok"])

    @cached_property
    def digest(self) -> str:
        """A digest of its config, of names and shapes, and of the beginning of every tensor."""
        parts = [repr(sorted(self.model.config.items(), key=str)).encode()]
        for name, tensor in sorted(self.model.tensors.items()):
            read_N = tensor.open().read(0, np.empty(min(tensor.size, _SAMPLE), tensor.dtype.storage))
            parts.append(f"{name} {tensor.dtype.name} {tensor.shape}".encode() + read_N.tobytes())
        return file_digest(b"".join(parts))


def open_mixture(recipe: ReductionRecipe) -> Mixture:
    """The recipe's mixture, checked by its config and headers.

    Raises InputError for a dense model, experts of unequal shapes, and numbers of experts that cannot be.
    """
    checkpoint = with_numbers(locate(recipe.model, name=NAME, relative_to=recipe.folder))
    model = SourceModel.of(checkpoint)
    count = expert_count(model.family, model.written)
    if not count:
        raise InputError(
            f"{recipe.source}: {recipe.model} is of type {model.model_type!r}, which is no native mixture that "
            "moerge knows: name one"
        )
    if model.model_type not in FAMILIES:
        raise InputError(
            f"{recipe.source}: mixtures of type {model.model_type!r} cannot be reduced yet, those of type "
            f"{', '.join(FAMILIES)} can"
        )
    check_storage([model])
    expected = expected_of(model)
    check_present([model], {model.name: relevant(model)}, expected)
    check_shapes([model], {model.name: relevant(model)}, expected)
    mixture = Mixture(model, expert_labels(checkpoint))
    _check_counts(recipe, mixture, count)
    return mixture


def _check_counts(recipe: ReductionRecipe, mixture: Mixture, count: int) -> None:
    reduction, source = recipe.reduction, recipe.source
    top_k = reduction.top_k or mixture.top_k
    grouped = next((key for key in _GROUPED_KEYS if (mixture.model.config.get(key) or 1) != 1), None)
    if not mixture.layers:
        raise InputError(f"{source}: {recipe.model} has no layer with experts")
    if grouped:
        raise InputError(f"{source}: {recipe.model} routes within groups of experts ({grouped}), which must stay of one size")
    if reduction.experts > count:
        raise InputError(f"{source}: reduce.experts is {reduction.experts}, but {recipe.model} has only {count} in a layer")
    if reduction.experts < top_k:
        lower = f"lower it too, with 'top_k: {reduction.experts}', or " if reduction.top_k is None else ""
        raise InputError(
            f"{source}: reduce.experts is {reduction.experts}, but each token goes to {top_k} (top_k): "
            f"{lower}keep at least {top_k}"
        )
    if top_k > mixture.top_k:
        raise InputError(f"{source}: reduce.top_k is {top_k}, more than the {mixture.top_k} that the model was trained with")


@dataclass(frozen=True, eq=False)
class Assembler:
    """The operations of the smaller mixture. `base` has the ancestor's matrices by layer and part where a method needs it."""

    mixture: Mixture
    choice: Choice
    reduction: Reduction
    base: Mapping[int, Mapping[str, Source]]

    @cached_property
    def written(self) -> dict[str, Any]:
        """The result's config.json, but for its element type."""
        model, reduction = self.mixture.model, self.reduction
        assert model.family is not None
        return with_experts(model.written, model.family, reduction.experts, reduction.top_k or self.mixture.top_k)

    def config(self, dtype: str) -> dict[str, Any]:
        """The result's config.json."""
        return portable_config(self.written, family=self.mixture.model.family, dtype=dtype)

    @cached_property
    def fitter(self) -> ReductionFitter:
        """Computes what the plan's operations cannot."""
        return ReductionFitter(self.mixture.tensors, self.mixture.model.written, self.written, self.choice, self.reduction)

    def outputs(self) -> list[Output]:
        """All tensors of the result."""
        family = self.mixture.model.family
        assert family is not None
        expected = expected_tensors(family, normalized_config(self.written, family))
        return [self._output(tensor) for tensor in expected]

    def _output(self, tensor: ExpectedTensor) -> Output:
        stored = self.mixture.model.tensors
        choice = self._choice(tensor.role)
        if choice is None or not (tensor.expert is not None or tensor.parts or is_routed(tensor.role)):
            own = stored[tensor.name]
            return Output(tensor.name, tensor.role, own.dtype, tensor.shape, Copy(Source(NAME, own)))
        operation = self._routed(tensor, choice) if is_routed(tensor.role) else self._expert(tensor, choice)
        first = (
            next(iter(self.mixture.tensors.experts[choice.layer][0].values()))
            if tensor.expert is not None
            else stored[tensor.name]
        )
        return Output(tensor.name, tensor.role, first.dtype, tensor.shape, operation)

    def _choice(self, role: str) -> LayerChoice | None:
        number = int(role.split(".")[1]) if role.startswith("layers.") else -1
        return next((choice for choice in self.choice.layers if choice.layer == number), None)

    def _routed(self, tensor: ExpectedTensor, choice: LayerChoice) -> Operation:
        """The rows of what stays."""
        if self.reduction.router == "fit" and choice.gone and len(tensor.shape) == 2:
            return Fit(self.fitter)
        own = self.mixture.model.tensors[tensor.name]
        rows = np.array(choice.kept, np.int64)
        return Copy(Source(NAME, RowsTensor(tensor.name, (own,), (rows,), np.zeros(len(rows), np.int16))))

    def _expert(self, tensor: ExpectedTensor, choice: LayerChoice) -> Operation:
        fold = self.reduction.merge
        grouped = [slot for slot, expert in enumerate(choice.kept) if len(choice.members(expert)) > 1]
        if tensor.expert is not None:
            if tensor.expert in grouped and fold is not None and fold.computed:
                return Fit(self.fitter)
            return self._matrix(choice, choice.kept[tensor.expert], tensor.role.rpartition(".")[2])
        if grouped and fold is not None and fold.computed:
            return Fit(self.fitter)
        return Copy(joined(tensor.name, tensor.shape, list(self._stacked(tensor, choice))))

    def _stacked(self, tensor: ExpectedTensor, choice: LayerChoice) -> Iterator[Source]:
        """The parts of a tensor of all experts, those that are merged as they are read."""
        parts = [role.rpartition(".")[2] for role in tensor.parts]
        shape = (tensor.shape[1] // len(parts), *tensor.shape[2:])
        for expert in choice.kept:
            for part in parts:
                operation = self._matrix(choice, expert, part)
                if isinstance(operation, Copy):
                    yield operation.source
                else:
                    dtype = self.mixture.model.tensors[tensor.name].dtype
                    output = Output(f"{tensor.name}.{expert}.{part}", tensor.role, dtype, shape, operation)
                    yield Source(NAME, merged_tensors([output])[output.name])

    def _matrix(self, choice: LayerChoice, expert: int, part: str) -> Operation:
        """One matrix of what stays: its own, or merged with those of its group."""
        members = choice.members(expert)
        sources = tuple(Source(NAME, self.mixture.tensors.experts[choice.layer][member][part]) for member in members)
        if len(sources) == 1:
            return Copy(sources[0])
        fold = self.reduction.merge
        method: MergeMethod = fold.method if isinstance(fold, MethodFold) else Linear()
        weights = choice.weights(expert) if method.uses_weights else (1.0,) * len(members)
        base = self.base[choice.layer][part] if method.uses_task_vectors else None
        return Merge(method.for_experts(tuple(map(str, members))), sources, weights, base)


def base_matrices(recipe: ReductionRecipe, mixture: Mixture) -> tuple[Mapping[int, Mapping[str, Source]], SourceModel | None]:
    """The matrices of the ancestor of the experts by layer and part, and its model where it is another one.

    Raises InputError if there is no such expert or model, or if its matrices have other shapes.
    """
    fold = recipe.reduction.merge
    if not isinstance(fold, MethodFold) or fold.base is None:
        return {}, None
    label = str(fold.base)
    experts = mixture.tensors.experts
    if label in mixture.labels or (label.isdecimal() and int(label) < len(mixture.labels)):
        number = mixture.labels.index(label) if label in mixture.labels else int(label)
        return {layer: _sources(NAME, experts[layer][number]) for layer in experts}, None
    model = SourceModel.of(with_numbers(locate(label, name="base", relative_to=recipe.folder)))
    by_role = {tensor.role: tensor.name for tensor in expected_of(model)}
    found: dict[int, Mapping[str, Source]] = {}
    for layer, first in ((layer, experts[layer][0]) for layer in experts):
        own = {part: by_role.get(f"layers.{layer}.ffn.{part}", "") for part in first}
        wrong = next((part for part, name in own.items() if _shape(model, name) != first[part].shape), None)
        if wrong:
            raise InputError(
                f"{recipe.source}: reduce.merge.base: {label} has no matrix 'layers.{layer}.ffn.{wrong}' of the experts' shape "
                f"{list(first[wrong].shape)}: name the dense model that they stem from, or an expert"
            )
        found[layer] = _sources("base", {part: model.tensors[name] for part, name in own.items()})
    return found, model


def _sources(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Source]:
    return {part: Source(name, tensor) for part, tensor in tensors.items()}


def _shape(model: SourceModel, name: str) -> tuple[int, ...] | None:
    return model.tensors[name].shape if name in model.tensors else None


def names_of(mixture: Mixture, choice: Choice) -> tuple[str, ...]:
    """The names of the experts that are left: their own where they are the same in all layers, and numbers elsewhere."""
    kept = {layer.kept for layer in choice.layers}
    alone = kept.pop() if len(kept) == 1 else None
    folded = any(len(layer.members(expert)) > 1 for layer in choice.layers for expert in layer.kept)
    if alone is None or folded:
        return tuple(map(str, range(len(choice.layers[0].kept))))
    return tuple(mixture.labels[expert] for expert in alone)


def left_out(mixture: Mixture) -> list[str]:
    """A warning about tensors that the family's table does not have."""
    known = {tensor.name for tensor in expected_of(mixture.model)}
    other = [name for name in relevant(mixture.model) if name not in known]
    return [f"{len(other)} tensors that the family does not have are left out, such as {other[0]}"] if other else []
