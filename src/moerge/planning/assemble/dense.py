"""A dense model: every tensor merged, of all layers in turn or of slices of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moerge.architecture import ExpectedTensor
from moerge.architecture.config import portable_config
from moerge.architecture.derived import no_family
from moerge.architecture.mixture import is_routed
from moerge.errors import InputError
from moerge.planning.assemble.common import Assembled, Assembly
from moerge.planning.assemble.layer_values import reordered
from moerge.planning.assemble.merged_routers import merged_router, routers_warnings
from moerge.planning.checks import Candidates, check_present, check_shapes, expected_of, relevant
from moerge.planning.models import SourceModel
from moerge.recipe.rules import TensorContext
from moerge.recipe.schema import Recipe, Slice, Span
from moerge.tensors.tensor import Tensor

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def assemble_dense(assembly: Assembly) -> Assembled:
    """All tensors of the experts, merged; InputError for an override that means none of them."""
    if assembly.recipe.slices:
        return _stacked(assembly)
    experts = tuple(assembly.recipe.experts)
    last = _last_layers(assembly.candidates)
    outputs = []
    for tensor in assembly.candidates:
        layer = _layer(tensor)
        inputs = dict.fromkeys(assembly.models, tensor.name)
        depth = 0.0 if layer is None else _depth(layer, last[_stack(tensor)] + 1)
        context = TensorContext(tensor.role, tensor.name, 0, depth, inputs)
        gate = is_routed(tensor.role) and len(tensor.shape) > 1
        operation = merged_router(assembly, tensor, context) if gate else assembly.merged(tensor, experts, context=context)
        outputs.append(assembly.output(tensor, operation))
    assembly.resolver.check_all_used()
    return Assembled(_portable_config(assembly, assembly.leader), outputs, warnings=routers_warnings(assembly))


def _portable_config(assembly: Assembly, model: SourceModel) -> dict[str, Any]:
    if not model.model_type and model.family is None:  # tensors without a model of transformers'
        return dict(model.written)
    return portable_config(model.written, family=model.family, dtype=str(assembly.dtype.torch_name))


def stacked_candidates(models: Sequence[SourceModel], recipe: Recipe) -> Candidates:
    """Check what models in slices have beside their tables; it comes from the first slice's first model.

    Each is checked by itself: their numbers of layers may differ.

    Raises InputError for a family that moerge does not know, a missing tensor, and layers that a model does not have.
    """
    warnings, beside = [], {}
    for model in models:
        beside[model.name], unused = _beside(model, recipe)
        warnings += unused
    _check_slices({model.name: model.config["num_hidden_layers"] for model in models}, recipe)
    first = tuple(span.model for span in recipe.slices[0].sources)
    own = beside[first[0]]
    alike = {name for name in own if all(name in beside[m] and beside[m][name].shape == own[name].shape for m in first)}
    owners = {name: first[0] for name in own if name not in alike}
    if owners:
        text = f"{len(owners)} tensors beside the layers that not all models of the first slice share are {first[0]}'s: "
        warnings.append(text + next(iter(owners)))
    return Candidates([ExpectedTensor("", name, tensor.shape) for name, tensor in own.items()], owners, warnings)


def _beside(model: SourceModel, recipe: Recipe) -> tuple[dict[str, Tensor], list[str]]:
    """A model's tensors beside its table, which has to be complete, and a warning about those that its family does not have."""
    family, expected = model.family, expected_of(model)
    if family is None:
        kind = model.model_type
        reason = no_family(model.written)
        raise InputError(f"{recipe.source}: slices need a family that moerge knows, and it does not know {kind!r}: {reason}")
    check_present([model], {model.name: model.tensors}, expected)
    check_shapes([model], {model.name: model.tensors}, expected)
    known = {tensor.name for tensor in expected}
    other = {name: tensor for name, tensor in relevant(model).items() if name not in known}
    unused = [name for name in other if not family.is_unmodeled(name)]
    warning = f"{model.name}: {len(unused)} tensors that {family.model_type} does not use are left out: {', '.join(unused[:1])}"
    return {name: tensor for name, tensor in other.items() if name not in unused}, [warning] if unused else []


def _check_slices(layers: Mapping[str, int], recipe: Recipe) -> None:
    """InputError for a slice of layers that its model, which has so many `layers`, does not have."""
    for number, part in enumerate(recipe.slices):
        for span in part.sources:
            if span.stop > layers[span.model]:
                raise InputError(
                    f"{recipe.source}: slice {number + 1} takes the layers {span.start} to {span.stop - 1} of {span.model}, "
                    f"which has {layers[span.model]} (counted from 0)"
                )


def _stacked(assembly: Assembly) -> Assembled:
    """The slices on top of one another; what comes before the layers is merged as the first slice, what follows as the last."""
    slices = assembly.recipe.slices
    result = _with_layers_of(assembly.leader, slices)
    if result.family is None:
        raise InputError(f"slices: there is no config.json for this order of layers: {no_family(result.written)}")
    by_role = {model.name: {t.role: t for t in expected_of(model)} for model in assembly.models.values()}
    outputs = []
    rows = [_Row(number, offset) for number, part in enumerate(slices) for offset in range(part.layers)]
    places = [*_rows(expected_of(result, "the result"), rows), *((tensor, _Row(0)) for tensor in assembly.candidates)]
    for tensor, row in places:
        part = slices[row.slice_index]
        inputs = {span.model: _input(by_role[span.model], tensor, span, row) for span in part.sources}
        context = TensorContext(tensor.role, tensor.name, row.slice_index, row.depth(part.layers), inputs)
        members = tuple(span.model for span in part.sources)
        outputs.append(assembly.output(tensor, assembly.merged(tensor, members, context=context, base=part.base or "base")))
    assembly.resolver.check_all_used()
    return Assembled(_portable_config(assembly, result), outputs)


@dataclass(frozen=True)
class _Row:
    """A layer of the result: its slice and its place in there; no place for tensors outside of layers."""

    slice_index: int
    offset: int | None = None

    def depth(self, layers: int) -> float:
        return 0.0 if self.offset is None else _depth(self.offset, layers)


def _rows(tensors: Sequence[ExpectedTensor], rows: Sequence[_Row]) -> Iterator[tuple[ExpectedTensor, _Row]]:
    above = _Row(0)
    for tensor in tensors:
        layer = _layer(tensor)
        if layer is None:
            yield tensor, above
        else:
            above = _Row(rows[-1].slice_index)
            yield tensor, rows[layer]


def _with_layers_of(model: SourceModel, slices: Sequence[Slice]) -> SourceModel:
    """The model with as many layers in its config as the slices have, and lists by layer rearranged like them."""
    family, nested = model.family, model.nested
    assert family is not None
    language = dict(nested if isinstance(nested, Mapping) else model.written)
    own_name = next((name for name, key in family.keys.items() if key == "num_hidden_layers" and name in language), None)
    language[own_name or "num_hidden_layers"] = sum(part.layers for part in slices)
    order = [layer for part in slices for layer in range(part.sources[0].start, part.sources[0].stop)]
    language |= reordered(model.config, language, order)
    return model.with_written({**model.written, family.nested: language} if isinstance(nested, Mapping) else language)


def _input(by_role: Mapping[str, ExpectedTensor], tensor: ExpectedTensor, span: Span, row: _Row) -> str:
    """Return a model's name for the tensor that a slice takes; its own name where it has no role.

    Raises InputError where the result's config asks for something else of a layer than the layer is.
    """
    if row.offset is None:
        same = by_role.get(tensor.role, tensor)
        if same.shape != tensor.shape:
            raise InputError(
                f"slices: tensor {same.name!r} of {span.model} has shape {list(same.shape)}, which depends on the number of "
                f"layers: those of the result would make it {list(tensor.shape)}",
                code="models-differ",
            )
        return same.name
    layer = span.start + row.offset
    own = by_role.get(re.sub(r"^layers\.\d+\.", f"layers.{layer}.", tensor.role))
    if own is None or own.shape != tensor.shape:
        has = "has no such tensor" if own is None else f"has it in shape {list(own.shape)}, not {list(tensor.shape)}"
        raise InputError(
            f"slices: config.json cannot say this order of layers: it calls for {tensor.name!r}, and layer {layer} of "
            f"{span.model}, which would stand there, {has}: keep layers of one kind at places of that kind",
            code="models-differ",
        )
    return own.name


def _layer(tensor: ExpectedTensor) -> int | None:
    """The number of the layer that a tensor belongs to; guessed from its name in a family without roles."""
    if tensor.role:
        return int(tensor.role.split(".")[1]) if tensor.role.startswith("layers.") else None
    found = _LAYER.search(tensor.name)
    return int(found[1]) if found else None


def _stack(tensor: ExpectedTensor) -> str:
    """The beginning of the names of a tensor's layers, which those of a vision tower do not share; "" where it has a role."""
    found = None if tensor.role else _LAYER.search(tensor.name)
    return tensor.name[: found.start()] if found else ""


def _last_layers(tensors: Sequence[ExpectedTensor]) -> dict[str, int]:
    """The number of the last layer of every stack of layers."""
    last: dict[str, int] = {}
    for tensor in tensors:
        stack = _stack(tensor)
        last[stack] = max(last.get(stack, 0), _layer(tensor) or 0)
    return last


def _depth(layer: int, layers: int) -> float:
    """mergekit's t: 0 for the first layer, 1 for the last, and 1 for an only one."""
    return layer / (layers - 1) if layers > 1 else 1.0
