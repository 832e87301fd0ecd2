"""Token-routed models whose experts come from mixtures that exist: their format, config and routers' rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture import ExpectedTensor, moe_format
from moerge.architecture.config import changed
from moerge.architecture.mixture import expert_count, with_experts
from moerge.architecture.moe_format import MoEFormat
from moerge.checkpoint.expert import SEPARATOR, ExpertCheckpoint
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.operations.operations import Copy, Operation
from moerge.planning.assemble.common import Assembly
from moerge.planning.merged import MergedCheckpoint
from moerge.planning.models import SourceModel
from moerge.routers.base import KeepRouter, Router
from moerge.tensors.source import Source
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.joined import joined

_SETTLED = ("vocab_size", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that planning may have changed in the config of the model that leads."""


def format_of(leader: SourceModel, name: str) -> MoEFormat:
    """The recipe's format; of experts that no dense architecture computes, the one of the mixture they come from."""
    family = leader.family
    if family is None or not expert_count(family, leader.written):
        return moe_format(name, leader.config)
    if not isinstance(leader.checkpoint, ExpertCheckpoint):
        raise InputError(
            f"no token-routed MoE format is known for experts of type {family.model_type!r} that are mixtures themselves: name "
            f"one of {leader.name}'s experts as MIXTURE{SEPARATOR}EXPERT"
        )
    if name not in ("auto", family.model_type):
        raise InputError(f"moe.format: {leader.name} is an expert of a {family.model_type}, which does not map to {name} exactly")
    return MoEFormat(
        family.model_type, family, frozenset({family.model_type}), lambda config, experts, k: {}, lambda config: None
    )


def config_of(leader: SourceModel, chosen: MoEFormat, experts: int, top_k: int) -> dict[str, Any]:
    """The result's config.json: where an expert of a mixture leads, that mixture's own with other numbers of experts."""
    source = leader.checkpoint
    if not isinstance(source, ExpertCheckpoint) or source.family.model_type != chosen.family.model_type:
        return chosen.convert(leader.config, experts, top_k)
    settled = {key: leader.find_key(key) for key in _SETTLED if leader.find_key(key) is not None}
    return with_experts(changed(source.mixture.config, chosen.family, settled), chosen.family, experts, top_k)


def router_operation(assembly: Assembly, router: Router, tensor: ExpectedTensor) -> Operation:
    """The operation that fills a tensor of the router: the recipe's kind of it, or the rows that experts have in mixtures."""
    if not isinstance(router, KeepRouter):
        return router.operation(tensor)
    sources = []
    for name in assembly.recipe.expert_names:
        model = assembly.models[name].checkpoint
        row = _rows(model).get(tensor.role)
        if row is None:
            raise InputError(
                f"{assembly.recipe.source}: moe.router: 'keep' takes the rows that experts have in their mixtures, and {name} "
                f"({model.location}) is none's expert: name one as MIXTURE{SEPARATOR}EXPERT, or choose 'kind: ridge' or another"
            )
        sources.append(Source(name, row))
    return Copy(joined(tensor.name, tensor.shape, sources))


def _rows(model: Checkpoint) -> Mapping[str, Tensor]:
    """A model's rows of its mixture's router; of a recipe those of its first expert that has some."""
    if isinstance(model, MergedCheckpoint):
        return next(filter(None, map(_rows, model.plan.models)), {})
    return model.rows if isinstance(model, ExpertCheckpoint) else {}


def unlike_mixtures(models: Mapping[str, SourceModel], router: Router) -> str | None:
    """A warning about experts of several mixtures: rows of several routers, or gates that mean something else."""
    origins = {m.checkpoint.mixture.location: m.checkpoint for m in models.values() if isinstance(m.checkpoint, ExpertCheckpoint)}
    if len(origins) < 2:
        return None
    told = {where: m.mixture_config.get("norm_topk_prob") for where, m in origins.items()}
    if len(set(told.values())) > 1:
        return (
            f"norm_topk_prob differs between the mixtures ({told}): the gates of some experts mean something else in the result"
        )
    if isinstance(router, KeepRouter):
        return f"the routers of {', '.join(origins)} were not trained together: their rows may compete on unequal terms"
    return None
