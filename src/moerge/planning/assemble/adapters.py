"""Experts given as LoRA adapters that stay adapters in a sequence-routed model: the base's weights once, and their factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moerge.architecture import ExpectedTensor
from moerge.architecture.sequence import GATE, adapter_factors
from moerge.checkpoint.adapter import AdaptedCheckpoint
from moerge.errors import InputError
from moerge.modeling.adapters_moerge import Adapted, groups_of
from moerge.modeling.naming_moerge import dense_name, role_of
from moerge.operations.operations import Copy, Output
from moerge.planning.assemble.common import Assembly
from moerge.tensors.source import Source
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.low_rank import LowRankTensor

_MERGE = "leave out 'moe.adapters', which makes full experts of them"


def kept_adapters(assembly: Assembly, dense: Mapping[str, Any]) -> tuple[dict[str, Any], list[Output]]:
    """`adapters` of config.json, and the factors' tensors.

    Raises InputError for an expert that is no adapter, or changes separate tensors by more than scale * B @ A.
    """
    recipe = assembly.recipe
    assert recipe.moe is not None
    settings, outputs, layers = {}, [], int(dense["num_hidden_layers"])
    separate = [tensor for tensor in assembly.candidates if _role(tensor.name) in recipe.moe.separate]
    for name in recipe.experts:
        model = assembly.models[name]
        if not isinstance(model.checkpoint, AdaptedCheckpoint) or recipe.experts[name].adapter is not None:
            raise InputError(
                f"{recipe.source}: moe.adapters: {name} is a full model, and only adapters on the base can be kept: extract one "
                f"with `moerge extract`, or {_MERGE}"
            )
        number, found = recipe.expert_names.index(name), []
        for tensor, changed in _changed(assembly, name, separate):
            one = _adapted(tensor, number, changed)
            found.append(one)
            both = adapter_factors(tensor, one)
            for factor, stored in zip(both, (changed.a, changed.b), strict=True):
                assert stored is not None
                outputs.append(assembly.output(factor, Copy(Source(name, stored))))
        settings[name] = groups_of(found, layers)
    return settings, outputs


def kept_note(shared: Sequence[Output], factors: Sequence[Output], separate: Sequence[str], experts: int) -> str:
    """Say how much smaller the result is than with a copy for each expert."""
    own = sum(output.nbytes for output in shared if output.name != GATE and role_of(dense_name(output.name)[0]) in separate)
    added = sum(output.nbytes for output in factors)
    instead = (experts - 1) * own
    return f"adapters stay adapters: {added / 1e6:,.3g} MB beside the base, where full experts take {instead / 1e6:,.3g} MB"


def _role(name: str) -> str | None:
    try:
        return role_of(name)
    except ValueError:
        return None


def _changed(assembly: Assembly, name: str, separate: Sequence[ExpectedTensor]) -> Iterator[tuple[ExpectedTensor, LowRankTensor]]:
    """The separate tensors that an expert changes."""
    model, base = assembly.models[name], assembly.models["base"]
    for tensor in separate:
        own = model.tensors[tensor.name]
        if own is base.tensors[tensor.name]:
            continue
        problem = _problem(own)
        if problem:
            raise InputError(
                f"{assembly.recipe.source}: moe.adapters: {name} {problem} {tensor.name!r}, which cannot be kept as a low-rank "
                f"adapter: {_MERGE}"
            )
        assert isinstance(own, LowRankTensor)
        yield tensor, own


def _problem(tensor: Tensor) -> str | None:
    """Why a changed tensor is more than base + scale * B @ A."""
    if not isinstance(tensor, LowRankTensor):
        return "stores a whole"
    if tensor.a is None:
        return "has a trained bias"
    if tensor.magnitude is not None:
        return "is a DoRA on"
    return "transposes" if tensor.transposed else None


def _adapted(tensor: ExpectedTensor, expert: int, changed: LowRankTensor) -> Adapted:
    _, _, layer, module = tensor.name.removesuffix(".weight").split(".", 3)
    assert changed.a is not None
    return Adapted(expert, int(layer), module, changed.a.shape[0], changed.scale)
