"""Models that say the same in other words: lost prefixes, spellings of other versions, and text models beside multimodal ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from moerge.architecture.config import nested_key
from moerge.architecture.parts import PARTS, SENSES, part_of
from moerge.checkpoint.module_names import plain_name
from moerge.planning.models import SourceModel

_SAME_LANGUAGE_MODEL = {
    "qwen2_vl": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_omni": "qwen2",
    "qwen3_vl": "qwen3",
    "qwen3_vl_moe": "qwen3_moe",
    "qwen3_omni_moe": "qwen3_moe",
}
"""Types of language models inside multimodal ones, without `_text`, that compute on text what another type computes."""
_POSITIONS = ("mrope_section", "mrope_interleaved")
"""Keys of rope that say how positions in images are laid out; on text they change nothing."""


def with_alike_names(models: Sequence[SourceModel], source: str, *, across: bool) -> tuple[SourceModel, ...]:
    """The models under the names of `source`, where only prefixes differ: `model.` is lost or added in some saves.

    With `across` also models of another type that are its language model, or have it: a text model beside a multimodal one.
    """
    leader = next(model for model in models if model.name == source)
    return tuple(_alike(model, leader, across) for model in models)


def _alike(model: SourceModel, leader: SourceModel, across: bool) -> SourceModel:
    if model.model_type == leader.model_type:
        return _prefixed(_spelled(model, leader), leader)
    return _as_language_model(model, leader) if across else model


def _spelled(model: SourceModel, leader: SourceModel) -> SourceModel:
    """A multimodal model with names whose wrappers stand as in the leader's: `language_model.model.`, `model.language_model.`."""
    names = _names(model.tensors, leader.tensors) if _senses(model) or _senses(leader) else {}
    if all(name == stored for stored, name in names.items()):
        return model
    renamed = model.with_tensors({names[stored]: tensor for stored, tensor in model.tensors.items()})
    return SourceModel.of(renamed.checkpoint)


def _names(stored: Collection[str], known: Collection[str]) -> dict[str, str]:
    """The known name for each stored one, or the stored one itself: of the same part, and the same but for wrappers."""
    free: dict[tuple[str, str], list[str]] = {}
    for name in known:
        if name not in stored:
            free.setdefault(_place(name), []).append(name)
    names = {}
    for name in stored:
        candidates = [name] if name in known else free.get(_place(name), [])
        names[name] = candidates[0] if len(candidates) == 1 else name
    return names if len(set(names.values())) == len(names) else {name: name for name in stored}


def _place(name: str) -> tuple[str, str]:
    part = part_of(name, None)
    return part if part in PARTS else "", plain_name(name)


def _as_language_model(model: SourceModel, leader: SourceModel) -> SourceModel:
    """A model of another type as if it were the leader with other weights, if their language models are of one kind.

    What one of them sees or hears with is left to `Parts`, or left out where the leader is a text model.
    """
    kind, beside = _language_type(model), _senses(model)
    if kind != _language_type(leader):
        return model
    names = _names([name for name in model.tensors if name not in beside], leader.tensors)
    warnings = [f"{model.name}: its {kind} language model is read as that of {leader.name}, a {leader.model_type}"]
    if beside:
        remedy = f"'config: {model.name}' keeps them"
        warnings.append(f"{model.name}: {len(beside)} tensors beside its language model are left out ({remedy}): {beside[0]}")
    renamed = model.with_tensors({name: model.tensors[stored] for stored, name in names.items()})
    renamed = renamed.with_written(_with_language_model(leader, _language_config(model, leader)))
    return SourceModel.of(renamed.warned(*warnings).checkpoint)


def _senses(model: SourceModel) -> list[str]:
    """The tensors that a model sees or hears with."""
    return [name for name in model.tensors if part_of(name, None) in SENSES]


def _language_type(model: SourceModel) -> str:
    inner = model.nested
    named = str((isinstance(inner, Mapping) and inner.get("model_type")) or model.model_type).removesuffix("_text")
    return _SAME_LANGUAGE_MODEL.get(named, named)


def _language_config(model: SourceModel, leader: SourceModel) -> dict[str, Any]:
    """The keys of the model's normalized config that are of its language model or of the leader's."""
    inner = model.nested
    keys = (inner if isinstance(inner, Mapping) else model.config).keys() | leader.config.keys()
    known = {key: value for key, value in model.config.items() if key in keys and not key.endswith(("_config", "_token_id"))}
    left_out = ("model_type", "architectures", "auto_map", "transformers_version")
    known = {key: value for key, value in known.items() if key not in left_out}
    return {**known, "rope_scaling": _scaling(known.get("rope_scaling"), leader.config.get("rope_scaling"))}


def _scaling(own: Any, theirs: Any) -> Any:
    """The model's rope with positions laid out as the leader's are."""
    scaling = {key: value for key, value in own.items() if key not in _POSITIONS} if isinstance(own, Mapping) else own
    positions = {key: theirs[key] for key in _POSITIONS if key in theirs} if isinstance(theirs, Mapping) else {}
    if not positions:
        return None if isinstance(scaling, Mapping) and scaling.get("rope_type") == "default" else scaling
    return {"rope_type": "default", **(scaling or {}), **positions}


def _with_language_model(leader: SourceModel, language: Mapping[str, Any]) -> dict[str, Any]:
    """The leader's config.json with another language model."""
    nested = leader.nested
    if not isinstance(nested, Mapping):
        return {**{key: value for key, value in leader.written.items() if key != "rope_parameters"}, **language}
    outer = {key: value for key, value in leader.written.items() if key not in language}
    inner = {key: value for key, value in nested.items() if key != "rope_parameters"}
    return {**outer, nested_key(leader.written, leader.family): {**inner, **language}}


def _prefixed(model: SourceModel, leader: SourceModel) -> SourceModel:
    if _most(leader, model.tensors):
        return model
    starts = sorted({name.partition(".")[0] + "." for name in (*leader.tensors, *model.tensors)})
    for said, rename in (("lack", str.__add__), ("have", lambda start, name: name.removeprefix(start))):
        for start in starts:
            names = {name: new if (new := rename(start, name)) in leader.tensors else name for name in model.tensors}
            if _most(leader, names.values()) and len(set(names.values())) == len(names):
                warning = f"{model.name}: its tensors {said} the prefix {start!r}, unlike {leader.name}'s: read with its names"
                renamed = model.with_tensors({names[name]: tensor for name, tensor in model.tensors.items()})
                return SourceModel.of(renamed.warned(warning).checkpoint)
    return model


def _most(leader: SourceModel, names: Collection[str]) -> bool:
    """Return whether more than half of the names are the leader's."""
    return sum(name in leader.tensors for name in names) * 2 > len(names)
