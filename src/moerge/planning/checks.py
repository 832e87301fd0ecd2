"""Checks that models can be merged: the same family, config, vocabulary and tensors. Every failure names the culprit."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moerge.architecture import family_of
from moerge.architecture.config import STRUCTURAL, differences, normalized_config
from moerge.architecture.family import ExpectedTensor, Family, expected_tensors
from moerge.architecture.stored import stored_family, unwrapped
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.planning.parts import Parts
from moerge.recipe.schema import Recipe
from moerge.tensors.tensor import Tensor

_ANY_DEPTH = {"num_hidden_layers": None, "layer_types": None, "moe_layers": None}

KEEP_WHOLE = "a 'moe' section with 'format: moerge' keeps them whole and routes between them"
"""What can be made of models that cannot be merged tensor by tensor."""


def with_canonical_names(model: Checkpoint) -> Checkpoint:
    """The model with its tensors under the names that its family's table has for them, and without what wrappers put into them.

    Raises InputError if it has a tensor under two names.
    """
    plain = unwrapped(model.tensors)
    family = stored_family(model.config, plain.values())
    names = {stored: canonical_name(name, family) for stored, name in plain.items()}
    if all(name == stored for stored, name in names.items()):
        return model
    tensors: dict[str, Tensor] = {}
    for stored, name in names.items():
        other = tensors.setdefault(name, model.tensors[stored])
        if other is not model.tensors[stored]:
            raise InputError(f"{model.name}: tensors {other.name!r} and {stored!r} are the same: remove one of them")
    wrapped = next((stored for stored, name in plain.items() if stored != name), None)
    said = f"{model.name}: {wrapped!r} and others have a prefix that torch.compile or another wrapper leaves: read without it"
    return replace(model, tensors=tensors, warnings=(*model.warnings, said) if wrapped else model.warnings)


_LAYER_NORM = re.compile(r"LayerNorm\.(gamma|beta)$")


def canonical_name(name: str, family: Family | None) -> str:
    """A tensor's name as its family's table has it, and as transformers has had it since it has no TensorFlow names."""
    name = _LAYER_NORM.sub(lambda match: "LayerNorm.weight" if match[1] == "gamma" else "LayerNorm.bias", name)
    return name if family is None else family.canonical_name(name)


def with_alike_names(models: Sequence[Checkpoint], source: str) -> tuple[Checkpoint, ...]:
    """The models with names that begin as those of `source`, where only that differs: `model.` is lost or added in some saves."""
    leader = next(model for model in models if model.name == source)
    return tuple(_prefixed(model, leader) if model.model_type == leader.model_type else model for model in models)


def _prefixed(model: Checkpoint, leader: Checkpoint) -> Checkpoint:
    if _most(leader, model.tensors):
        return model
    starts = sorted({name.partition(".")[0] + "." for name in (*leader.tensors, *model.tensors)})
    for said, rename in (("lack", str.__add__), ("have", lambda start, name: name.removeprefix(start))):
        for start in starts:
            names = {name: new if (new := rename(start, name)) in leader.tensors else name for name in model.tensors}
            if _most(leader, names.values()) and len(set(names.values())) == len(names):
                warning = f"{model.name}: its tensors {said} the prefix {start!r}, unlike {leader.name}'s: read with its names"
                tensors = {names[name]: tensor for name, tensor in model.tensors.items()}
                return replace(model, tensors=tensors, warnings=(*model.warnings, warning))
    return model


def _most(leader: Checkpoint, names: Collection[str]) -> bool:
    """Return whether more than half of the names are the leader's."""
    return sum(name in leader.tensors for name in names) * 2 > len(names)


def check_models(models: Sequence[Checkpoint]) -> None:
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


def check_storage(models: Sequence[Checkpoint]) -> None:
    """InputError for layouts that are not those on disk."""
    for model in models:
        _check_layout(model)


_SPLIT = (
    "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; m = M.from_pretrained({source!r}, dtype='auto'); "
    "n = M.from_config(m.config, dtype=m.dtype); n.load_state_dict(m.state_dict()); n.save_pretrained({target!r}); "
    "T.from_pretrained({source!r}).save_pretrained({target!r})"
)
"""A model that was loaded is saved as it was found; a new one in the layout that its family has on disk."""


def _check_layout(model: Checkpoint) -> None:
    family = family_of(model.config)
    fused = next((name for name in model.tensors if family and family.is_fused(name)), None)
    if fused:
        command = _SPLIT.format(source=str(model.folder), target=f"{model.folder}-split")
        raise InputError(
            f"{model.name}: tensor {fused!r} in {model.folder} holds all experts of a layer, which is "
            f"{model.model_type}'s layout in transformers' memory and not the one for files (mergekit 0.1.5 writes it): "
            f'convert the checkpoint with: python -c "{command}"'
        )


def check_configs(
    models: Sequence[Checkpoint], family: Family | None, *, source: str, named: bool, stacked: bool = False
) -> list[str]:
    """Warnings about config differences that the user settled by naming the source (`config:` in the recipe).

    Models of which layers are `stacked` may have different numbers of them. Sizes of vocabularies may differ: rows are matched by
    token.

    Raises InputError where a difference changes the tensors' shapes, or changes results and nobody settled it.
    """
    known = {model.name: normalized_config(model.config, family) for model in models}
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


def expected_of(family: Family, config: Mapping[str, Any], where: str) -> list[ExpectedTensor]:
    """The family's tensors for a config; InputError if the config lacks a size or garbles it."""
    try:
        return expected_tensors(family, normalized_config(config, family))
    except ValueError as error:
        raise InputError(f"{where}: config.json: {error}") from None


@dataclass(frozen=True)
class Candidates:
    """The tensors of a merge, in the model's order. `owners` are the models that some of them are taken from as they are."""

    tensors: Sequence[ExpectedTensor] = ()
    owners: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def merge_candidates(models: Sequence[Checkpoint], family: Family | None, recipe: Recipe, source: str) -> Candidates:
    """The tensors that the models have in common, and those that are one model's (see `Parts`).

    `source` names the model whose config is used. Raises InputError naming a tensor that is missing, that some have and others
    must not lack, or whose shape is wrong.
    """
    stored = {model.name: relevant(model, family) for model in models}
    leader = next(model for model in models if model.name == source)
    expected = expected_of(family, leader.config, source) if family else []
    roles = {tensor.name: tensor.role for tensor in expected}
    layers = normalized_config(leader.config, family).get("num_hidden_layers")
    parts = Parts(recipe, source, layers if type(layers) is int else None, stored, roles)
    first = models[0].name
    for name in sorted({name for tensors in stored.values() for name in tensors}):
        parts.decide(name, roles.get(name, ""), beside=family is not None and family.is_unmodeled(name))
    warnings = parts.warnings()
    shared = {
        model: {name: tensor for name, tensor in tensors.items() if name not in parts.owners and name not in parts.dropped}
        for model, tensors in stored.items()
    }
    check_present(models, shared, [tensor for tensor in expected if tensor.name not in parts.owners])
    extra = [ExpectedTensor("", name, tensor.shape) for name, tensor in shared[first].items() if name not in roles]
    found = [*(tensor for tensor in expected if tensor.name not in parts.owners), *extra]
    check_shapes(models, shared, found)
    strange = [tensor.name for tensor in extra if family is not None and not family.is_unmodeled(tensor.name)]
    if family is None:
        kind = models[0].model_type
        how = "merged by tensor name, without roles; configs are compared key by key"
        warnings.insert(0, f"unknown model type {kind!r}: {how}")
    elif strange:
        shown = ", ".join(strange[:3])
        warnings.append(f"{len(strange)} tensors that {family.model_type} does not use are merged by name: {shown}")
    taken = {name: stored[owner][name] for name, owner in parts.owners.items()}
    own = [ExpectedTensor(roles.get(name, ""), name, tensor.shape) for name, tensor in taken.items()]
    return Candidates([*found, *own], parts.owners, warnings)


def relevant(model: Checkpoint, family: Family | None) -> dict[str, Tensor]:
    """Tensors that the model reads: no buffers."""
    return {name: tensor for name, tensor in model.tensors.items() if family is None or not family.is_buffer(name)}


_NOT_THERE = "although its config.json calls for it: if that is the right config.json, fetch or copy the checkpoint again"
_NO_HEAD = (
    "and its config.json does not tie the head to the embedding: set tie_word_embeddings to true if it is the embedding, name "
    "the class without one in 'architectures', or else fetch or copy the checkpoint again"
)


def check_present(
    models: Sequence[Checkpoint], stored: Mapping[str, Mapping[str, Tensor]], expected: Sequence[ExpectedTensor]
) -> None:
    """InputError for a tensor that a model lacks."""
    for model in models:
        missing = next((tensor for tensor in expected if tensor.name not in stored[model.name]), None)
        if missing:
            cause = _NO_HEAD if missing.role == "head" else _NOT_THERE
            raise InputError(f"{model.name}: tensor {missing.name!r} is missing in {model.folder}, {cause}", code="damaged-file")


def check_shapes(
    models: Sequence[Checkpoint], stored: Mapping[str, Mapping[str, Tensor]], expected: Sequence[ExpectedTensor]
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
