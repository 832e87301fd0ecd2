"""Routers where mixtures are merged with one another: which operation fills them, and what to say about it."""

from __future__ import annotations

from moerge.architecture import ExpectedTensor
from moerge.architecture.mixture import is_routed
from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.operations.operations import Merge, Operation
from moerge.planning.assemble.common import Assembly
from moerge.recipe.rules import TensorContext
from moerge.routers.merged import AverageRouters, BaseRouters, CalibratedRouters
from moerge.tensors.source import Source


def merged_router(assembly: Assembly, gate: ExpectedTensor, context: TensorContext) -> Operation:
    """The operation of a router's matrix: the recipe's choice, or a merge like any other."""
    routers, experts = assembly.recipe.routers, tuple(assembly.recipe.experts)
    if isinstance(routers, CalibratedRouters):
        return routers.operation(gate)
    if isinstance(routers, BaseRouters):
        return assembly.copied("base", gate.name)
    if isinstance(routers, AverageRouters):
        sources = tuple(Source(name, assembly.models[name].tensors[gate.name]) for name in experts)
        return Merge(Average(), sources, (1.0,) * len(sources))
    return assembly.merged(gate, experts, context=context)


def routers_warnings(assembly: Assembly) -> tuple[str, ...]:
    """Warn where routers are merged and nobody chose that; InputError for a choice where there are none."""
    recipe = assembly.recipe
    routed = any(is_routed(tensor.role) for tensor in assembly.candidates)
    if recipe.routers is not None and not routed:
        raise InputError(
            f"{recipe.source}: routers: {assembly.source} is no mixture of experts, so it has none: remove 'routers'"
        )
    if recipe.routers is not None or not routed or len(recipe.experts) < 2:
        return ()
    return (
        "routers are merged like any matrix, which may send tokens to other experts than each model does: 'routers: {kind: "
        "calibrated}' fits them to the models' own routing on calibration text; kind base, average or merged settles it without",
    )
