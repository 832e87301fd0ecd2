"""Checks that models can be merged: the same family, config, vocabulary and tensors. Every failure names the culprit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moerge.architecture.config import STRUCTURAL, differences
from moerge.architecture.derived import no_family
from moerge.architecture.family import ExpectedTensor, expected_tensors
from moerge.errors import InputError
from moerge.planning.models import SourceModel
from moerge.planning.parts import Parts
from moerge.recipe.schema import Recipe
from moerge.tensors.tensor import Tensor

_ANY_DEPTH = {"num_hidden_layers": None, "layer_types": None, "moe_layers": None}

KEEP_WHOLE = "a 'moe' section with 'format: moerge' keeps them whole and routes between them"
"""What can be made of models that cannot be merged tensor by tensor."""


def check_models(models: Sequence[SourceModel]) -> None:
    """InputError for layouts that are not those on disk, and for models of different types."""
    check_storage(models)
    first = models[0]
    for model in models[1:]:
        if model.model_type != first.model_type:
            raise InputError(
                f"{model.name} is of type {model.model_type!r}, {first.name} of type {first.model_type!r}: "
                f"only models of one architecture can be merged tensor by tensor; {KEEP_WHOLE}",
                code="models-differ",
            )


def check_storage(models: Sequence[SourceModel]) -> None:
    """InputError for layouts that are not those on disk."""
    for model in models:
        _check_layout(model)


_SPLIT = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; m = M.from_pretrained({source!r}, dtype='auto'); "
    "n = M.from_config(m.config, dtype=m.dtype); n.load_state_dict(m.state_dict()); n.save_pretrained({target!r}); "
    "T.from_pretrained({source!r}).save_pretrained({target!r})"
)
"""A model that was loaded is saved as it was found; a new one in the layout that its family has on disk."""


def _check_layout(model: SourceModel) -> None:
    family = model.family
    fused = next((name for name in model.tensors if family and family.is_fused(name)), None)
    if fused:
        command = _SPLIT.format(source=str(model.folder), target=f"{model.folder}-split")
        raise InputError(
            f"{model.name}: tensor {fused!r} in {model.folder} holds all experts of a layer, which is "
            f"{model.model_type}'s layout in transformers' memory and not the one for files (mergekit 0.1.5 writes it): "
            f'convert the checkpoint with: python -c "{command}"'
        )


def check_configs(models: Sequence[SourceModel], *, source: str, named: bool, stacked: bool = False) -> list[str]:
    """Warnings about config differences that the user settled by naming the source (`config:` in the recipe).

    Models of which layers are `stacked` may have different numbers of them. Sizes of vocabularies may differ: rows are matched by
    token.

    Raises InputError where a difference changes the tensors' shapes, or changes results and nobody settled it.
    """
    known = {model.name: model.config for model in models}
    for name, config in known.items():
        if not isinstance(config["rope_scaling"], Mapping | None):
            raise InputError(f"{name}: config.json: rope_scaling should be a mapping, not {config['rope_scaling']!r}")
    differing = differences({name: {**config, **_ANY_DEPTH} for name, config in known.items()} if stacked else known)
    if all(type(size) is int and size > 0 for size in differing.get("vocab_size", {}).values()):
        differing.pop("vocab_size", None)
    structural = {key: values for key, values in differing.items() if key in STRUCTURAL}
    if structural:
        raise InputError(
            f"config.json: these models do not have the same shape: {_described(structural)}; {KEEP_WHOLE}", code="models-differ"
        )
    if not differing:
        return []
    described = _described(differing)
    if not named:
        raise InputError(
            f"config.json differs in what changes results: {described}; name the model whose config to use, "
            f"such as 'config: {source}' in the recipe",
            code="models-differ",
        )
    return [f"config.json differs, {source}'s is used: {described}"]


def _described(differing: Mapping[str, Mapping[str, Any]]) -> str:
    values = {key: ", ".join(f"{name}: {value!r}" for name, value in by.items()) for key, by in differing.items()}
    return "; ".join(f"{key} ({shown})" for key, shown in values.items())


def expected_of(model: SourceModel, where: str | None = None) -> list[ExpectedTensor]:
    """The tensors that a model's config calls for, none where moerge does not know its family.

    Raises InputError, about `where`, if the config lacks a size or garbles it.
    """
    try:
        return expected_tensors(model.family, model.config) if model.family else []
    except ValueError as error:
        raise InputError(f"{where or model.name}: config.json: {error}") from None


@dataclass(frozen=True)
class Candidates:
    """The tensors of a merge, in the model's order. `owners` are the models that some of them are taken from as they are."""

    tensors: Sequence[ExpectedTensor] = ()
    owners: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def merge_candidates(models: Sequence[SourceModel], recipe: Recipe, source: str) -> Candidates:
    """The tensors that the models have in common, and those that are one model's (see `Parts`).

    `source` names the model whose config is used. Raises InputError naming a tensor that is missing, that some have and others
    must not lack, or whose shape is wrong.
    """
    leader = next(model for model in models if model.name == source)
    stored = {model.name: relevant(model) for model in models}
    expected, layers = expected_of(leader), leader.config.get("num_hidden_layers")
    roles = {tensor.name: tensor.role for tensor in expected}
    parts = Parts(recipe, source, layers if type(layers) is int else None, stored, roles)
    for name in sorted({name for tensors in stored.values() for name in tensors}):
        parts.decide(name, roles.get(name, ""), beside=leader.family is not None and leader.family.is_unmodeled(name))
    warnings, shared = parts.warnings(), parts.shared
    modeled = [tensor for tensor in expected if tensor.name not in parts.owners]
    check_present(models, shared, modeled)
    other = [ExpectedTensor("", name, t.shape) for name, t in shared[models[0].name].items() if name not in roles]
    check_shapes(models, shared, [*modeled, *other])
    own = [ExpectedTensor(roles.get(name, ""), name, stored[owner][name].shape) for name, owner in parts.owners.items()]
    return Candidates([*modeled, *other, *own], parts.owners, [*_merged_by_name(leader, other), *warnings])


def _merged_by_name(leader: SourceModel, tensors: Sequence[ExpectedTensor]) -> list[str]:
    """A warning if tensors without a role are merged, those aside that the family has beside its language model."""
    if leader.family is None and not leader.model_type:
        return [f"{leader.name}: no config.json of a transformers model: tensors are merged by name, and nothing else is checked"]
    if leader.family is None:
        how = f"merged by tensor name, without roles; configs are compared key by key ({no_family(leader.written)})"
        return [f"unknown model type {leader.model_type!r}: {how}"]
    names = [tensor.name for tensor in tensors if not leader.family.is_unmodeled(tensor.name)]
    unused = f"{len(names)} tensors that {leader.family.model_type} does not use are merged by name"
    return [f"{unused}: {', '.join(names[:3])}"] if names else []


def relevant(model: SourceModel) -> dict[str, Tensor]:
    """Tensors that the model reads: no buffers."""
    family = model.family
    return {name: tensor for name, tensor in model.tensors.items() if family is None or not family.is_buffer(name)}


_NOT_THERE = "although its config.json calls for it: if that is the right config.json, fetch or copy the checkpoint again"
_NO_HEAD = (
    "and its config.json does not tie the head to the embedding: set tie_word_embeddings to true if it is the embedding, name "
    "the class without one in 'architectures', or else fetch or copy the checkpoint again"
)


def check_present(
    models: Sequence[SourceModel], stored: Mapping[str, Mapping[str, Tensor]], expected: Sequence[ExpectedTensor]
) -> None:
    """InputError for a tensor that a model lacks."""
    for model in models:
        missing = next((tensor for tensor in expected if tensor.name not in stored[model.name]), None)
        if missing:
            cause = _NO_HEAD if missing.role == "head" else _NOT_THERE
            raise InputError(f"{model.name}: tensor {missing.name!r} is missing in {model.folder}, {cause}", code="damaged-file")


def check_shapes(
    models: Sequence[SourceModel], stored: Mapping[str, Mapping[str, Tensor]], expected: Sequence[ExpectedTensor]
) -> None:
    """InputError for a tensor of another shape, or stored as what cannot be merged."""
    for model in models:
        for tensor in expected:
            actual = stored[model.name][tensor.name]
            if actual.shape != tensor.shape:
                raise InputError(
                    f"{model.name}: tensor {tensor.name!r} has shape {list(actual.shape)}, expected {list(tensor.shape)}",
                    code="damaged-file",
                )
            if actual.dtype.name.startswith("F") and not actual.dtype.is_float:
                raise InputError(
                    f"{model.name}: tensor {tensor.name!r} is stored as {actual.dtype.name}: "
                    "convert the checkpoint to float32, float16 or bfloat16 first"
                )
            first = stored[models[0].name][tensor.name]
            if actual.dtype.is_float != first.dtype.is_float:
                raise InputError(
                    f"tensor {tensor.name!r} is stored as {first.dtype.name} in {models[0].name} but as {actual.dtype.name} "
                    f"in {model.name}: numbers and codes cannot be merged"
                )
