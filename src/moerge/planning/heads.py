"""Heads and embeddings, as tied as their tensors are: config.json and files disagree in many checkpoints.

transformers 5 ties a head where config.json says so, unless both tensors are stored and differ. So does this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from moerge.architecture.config import nested_key
from moerge.planning.models import SourceModel
from moerge.tensors.streams import same_values

_KEY = "tie_word_embeddings"
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|output)\.weight")


def settle_head(model: SourceModel) -> SourceModel:
    """The model with a config that says what its tensors are, and a tied one without its head's copy."""
    embedding, head = _names(model)
    if head is None or not _says_tied(model):
        return model
    if embedding is None or embedding not in model.tensors:
        if model.family is None or head not in model.tensors:
            return model
        return _tied(model.with_tensors({_renamed(name, head, embedding): t for name, t in model.tensors.items()}), True)
    if head not in model.tensors:
        return _tied(model, True)
    return _settle_copy(model, embedding, head)


def _settle_copy(model: SourceModel, embedding: str, head: str) -> SourceModel:
    """The model whose config ties the two, and which stores both."""
    if not model.checkpoint.complete:
        asked = (
            f"{model.name}: whether its stored head {head!r} is its embedding, as config.json says, shows once it is downloaded"
        )
        return _without(model, head).warned(asked)
    if same_values(model.tensors[embedding], model.tensors[head]):
        return _without(model, head) if model.family is not None else model
    differs = (
        f"{model.name}: config.json ties head and embedding, and the stored {head!r} differs from {embedding!r}: read as untied, "
        f"as transformers 5 does (older versions drop such a head); '{_KEY}: false' in its config.json says so"
    )
    return _tied(model, False).warned(differs)


def untie_alike(models: Sequence[SourceModel]) -> tuple[tuple[SourceModel, ...], list[str]]:
    """The models, and a note: all of them untied where one is, with the embedding as the head of those that tie it."""
    pairs = {model.name: _names(model) for model in models}
    heads = {head for model in models if (head := pairs[model.name][1]) is not None and head in model.tensors}
    tied = [model.name for model in models if _says_tied(model)]
    bare = [model.name for model in models if not heads & model.tensors.keys() and (model.name in tied or _is_silent(model))]
    if len(heads) != 1:
        return tuple(models), []
    head = heads.pop()
    if len(tied) == len(models):  # the stored copies are the embedding
        return tuple(_without(model, head) for model in models) if bare else tuple(models), []
    if not tied and not bare:
        return tuple(models), []
    untied = []
    for model in models:
        embedding = pairs[model.name][0] or ""
        copies = {head: model.tensors[embedding]} if model.name in bare and embedding in model.tensors else {}
        untied.append(_tied(model.with_tensors({**model.tensors, **copies}), False))
    names = ", ".join(dict.fromkeys((*tied, *bare)))
    return tuple(untied), [f"the result has a head of its own, {head}: that of {names} is the embedding"]


def _names(model: SourceModel) -> tuple[str | None, str | None]:
    """Return the names of embedding and head; of unknown families those that are stored, if their names are usual."""
    if model.family is not None:
        by_role = {rule.role: rule.name for rule in model.family.tensors}
        return by_role.get("embedding"), by_role.get("head")
    return _only(_EMBEDDING, model.tensors), _only(_HEAD, model.tensors)


def _only(pattern: re.Pattern[str], names: Iterable[str]) -> str | None:
    """The name that matches, None if none does or several do."""
    matching = [name for name in names if pattern.fullmatch(name)]
    return matching[0] if len(matching) == 1 else None


def _said(model: SourceModel) -> list[bool]:
    """Return the values at the places in config.json that transformers' versions read."""
    places = (model.written, model.nested)
    return [bool(place[_KEY]) for place in places if isinstance(place, Mapping) and place.get(_KEY) is not None]


def _says_tied(model: SourceModel) -> bool:
    """Return whether one of these places, or the family's default, says that the head is the embedding."""
    said = _said(model)
    return any(said) if said else bool(model.config.get(_KEY))


def _is_silent(model: SourceModel) -> bool:
    """Return whether only the code of a family that moerge does not know says whether the head is the embedding."""
    return model.family is None and not _said(model)


def _tied(model: SourceModel, tied: bool) -> SourceModel:
    """The model with all places in its config saying the same, where they do not."""
    if set(_said(model)) <= {tied} and bool(model.config.get(_KEY)) == tied:
        return model
    inner = (
        {} if not isinstance(model.nested, Mapping) else {nested_key(model.written, model.family): {**model.nested, _KEY: tied}}
    )
    return model.with_written({**model.written, _KEY: tied, **inner})


def _without(model: SourceModel, head: str) -> SourceModel:
    return _tied(model.with_tensors({name: tensor for name, tensor in model.tensors.items() if name != head}), True)


def _renamed(name: str, head: str, embedding: str | None) -> str:
    return embedding if name == head and embedding is not None else name
