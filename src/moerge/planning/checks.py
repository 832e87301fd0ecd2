"""Whether models can be merged at all: the same family, config, vocabulary and tensors. Every failure names the culprit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moerge.architecture import family_of
from moerge.architecture.config import STRUCTURAL, canonical, differences
from moerge.architecture.family import Expected, Family, expected_tensors
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.tensors.tensor import Tensor

_ANY_DEPTH = {"num_hidden_layers": None, "layer_types": None, "moe_layers": None}

KEEP_WHOLE = "a 'moe' section with 'format: moerge' keeps them whole and routes between them"
"""What can be made of models that cannot be merged tensor by tensor."""


def respelled(model: Checkpoint) -> Checkpoint:
    """The model with its tensors under the names that its family's table has for them.

    Raises InputError if it has a tensor under two names.
    """
    family = family_of(model.config)
    if family is None or not family.spellings:
        return model
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.tensors.items():
        other = tensors.setdefault(family.spelled(name), tensor)
        if other is not tensor:
            raise InputError(f"{model.name}: tensors {other.name!r} and {name!r} are the same: remove one of them")
    return replace(model, tensors=tensors)


def check_models(models: Sequence[Checkpoint]) -> None:
    """InputError for layouts that are not those on disk, and for models of different types."""
    check_storage(models)
    first = models[0]
    for model in models[1:]:
        if model.model_type != first.model_type:
            raise InputError(
                f"{model.name} is of type {model.model_type!r}, {first.name} of type {first.model_type!r}: "
                f"only models of one architecture can be merged tensor by tensor; {KEEP_WHOLE}"
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
    known = {model.name: canonical(model.config, family) for model in models}
    for name, config in known.items():
        if not isinstance(config["rope_scaling"], Mapping | None):
            raise InputError(f"{name}: config.json: rope_scaling should be a mapping, not {config['rope_scaling']!r}")
    differing = differences({name: {**config, **_ANY_DEPTH} for name, config in known.items()} if stacked else known)
    if all(type(size) is int and size > 0 for size in differing.get("vocab_size", {}).values()):
        differing.pop("vocab_size", None)
    structural = {key: values for key, values in differing.items() if key in STRUCTURAL}
    if structural:
        raise InputError(f"config.json: these models do not have the same shape: {_described(structural)}; {KEEP_WHOLE}")
    if not differing:
        return []
    described = _described(differing)
    if not named:
        raise InputError(
            f"config.json differs in what changes results: {described}; name the model whose config to use, "
            f"such as 'config: {source}' in the recipe"
        )
    return [f"config.json differs, {source}'s is used: {described}"]


def _described(differing: Mapping[str, Mapping[str, Any]]) -> str:
    values = {key: ", ".join(f"{name}: {value!r}" for name, value in by.items()) for key, by in differing.items()}
    return "; ".join(f"{key} ({shown})" for key, shown in values.items())


def expected_of(family: Family, config: Mapping[str, Any], where: str) -> list[Expected]:
    """The family's tensors for a config; InputError if the config lacks a size or garbles it."""
    try:
        return expected_tensors(family, canonical(config, family))
    except ValueError as error:
        raise InputError(f"{where}: config.json: {error}") from None


def merge_candidates(models: Sequence[Checkpoint], family: Family | None) -> tuple[list[Expected], list[str]]:
    """The tensors that all models have, in the model's order, and warnings.

    Raises InputError naming a tensor that is missing somewhere, that some have and others lack, or whose shape is wrong.
    """
    stored = {model.name: _relevant(model, family) for model in models}
    names = stored[models[0].name]
    apart = [name for name in names if family is not None and family.is_untabled(name) and not _shared(name, stored)]
    stored = {model: {name: tensor for name, tensor in found.items() if name not in apart} for model, found in stored.items()}
    _check_same_names(models, stored)
    if family is None:
        found = [Expected("", name, tensor.shape) for name, tensor in names.items()]
        check_shapes(models, stored, found)
        kind = models[0].model_type
        return found, [f"unknown model type {kind!r}: merged by tensor name, without roles and without checking the config"]
    expected = expected_of(family, models[0].config, models[0].name)
    check_present(models, stored, expected)
    known = {tensor.name for tensor in expected}
    extra = [name for name in names if name not in known and name not in apart]
    strange = [name for name in extra if not family.is_untabled(name)]
    found = expected + [Expected("", name, names[name].shape) for name in extra]
    check_shapes(models, stored, found)
    warnings = []
    if strange:
        shown = ", ".join(strange[:3])
        warnings.append(f"{len(strange)} tensors that {family.model_type} does not use are merged by name: {shown}")
    if apart:
        first = models[0].name
        warnings.append(f"{len(apart)} tensors beside the language model that not all models share are {first}'s: {apart[0]}")
    return found + [Expected("", name, names[name].shape) for name in apart], warnings


def _shared(name: str, stored: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return len({tensors[name].shape if name in tensors else None for tensors in stored.values()}) == 1


def _relevant(model: Checkpoint, family: Family | None) -> dict[str, Tensor]:
    """Tensors that the model reads: no buffers, and no stored head where it is tied to the embedding."""
    if family is None:
        return dict(model.tensors)
    absent = {rule.name for rule in family.tensors if rule.role == "head" and not rule.applies(canonical(model.config, family))}
    return {name: t for name, t in model.tensors.items() if name not in absent and not family.is_buffer(name)}


def _check_same_names(models: Sequence[Checkpoint], stored: Mapping[str, Mapping[str, Tensor]]) -> None:
    everything = {name for tensors in stored.values() for name in tensors}
    for name in sorted(everything):
        having = [model.name for model in models if name in stored[model.name]]
        if len(having) < len(models):
            lacking = [model.name for model in models if name not in stored[model.name]]
            raise InputError(
                f"tensor {name!r} is in {', '.join(having)} but not in {', '.join(lacking)}: "
                "merging would drop it, so repair or leave out the odd model"
            )


def check_present(models: Sequence[Checkpoint], stored: Mapping[str, Mapping[str, Tensor]], expected: Sequence[Expected]) -> None:
    """InputError for a tensor that a model lacks."""
    for model in models:
        missing = next((tensor.name for tensor in expected if tensor.name not in stored[model.name]), None)
        if missing:
            raise InputError(
                f"{model.name}: tensor {missing!r} is missing in {model.folder}, although its config.json calls for it: "
                "fetch or copy the checkpoint again"
            )


def check_shapes(models: Sequence[Checkpoint], stored: Mapping[str, Mapping[str, Tensor]], expected: Sequence[Expected]) -> None:
    """InputError for a tensor of another shape, or stored as what cannot be merged."""
    for model in models:
        for tensor in expected:
            actual = stored[model.name][tensor.name]
            if actual.shape != tensor.shape:
                raise InputError(
                    f"{model.name}: tensor {tensor.name!r} has shape {list(actual.shape)}, expected {list(tensor.shape)}"
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
