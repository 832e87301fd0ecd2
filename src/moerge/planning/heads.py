"""Heads and embeddings, as tied as their tensors are: config.json and files disagree in many checkpoints.

transformers 5 ties a head where config.json says so, unless both tensors are stored and differ. So does this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moerge.architecture import Family
from moerge.architecture.config import nested_key, normalized_config
from moerge.checkpoint.reader import Checkpoint
from moerge.tensors.codec import decode
from moerge.tensors.tensor import Tensor

_KEY = "tie_word_embeddings"
_EMBEDDING = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings)\.weight")
_HEAD = re.compile(r"(.*\.)?(lm_head|embed_out|output)\.weight")
_PIECE = 1 << 20
"""Elements that are compared at a time."""


def settle_head(model: Checkpoint, family: Family | None) -> Checkpoint:
    """The model with a config that says what its tensors are, and a tied one without its head's copy."""
    embedding, head = _names(model, family)
    if head is None or not _says_tied(model.config, family):
        return model
    if embedding is None or embedding not in model.tensors:
        if family is None or head not in model.tensors:
            return model
        tensors = {_renamed(name, head, embedding): tensor for name, tensor in model.tensors.items()}
        return replace(model, tensors=tensors, config=_tied(model.config, family, True))
    if head not in model.tensors:
        return replace(model, config=_tied(model.config, family, True))
    if not model.complete:
        asked = (
            f"{model.name}: whether its stored head {head!r} is its embedding, as config.json says, shows once it is downloaded"
        )
        return replace(_without(model, head, family), warnings=(*model.warnings, asked))
    if _same(model.tensors[embedding], model.tensors[head]):
        return _without(model, head, family) if family is not None else model
    differs = (
        f"{model.name}: config.json ties head and embedding, and the stored {head!r} differs from {embedding!r}: read as untied, "
        f"as transformers 5 does (older versions drop such a head); '{_KEY}: false' in its config.json says so"
    )
    return replace(model, config=_tied(model.config, family, False), warnings=(*model.warnings, differs))


def untie_alike(models: Sequence[Checkpoint], family: Family | None) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """The models, and a note: all of them untied where one is, with the embedding as the head of those that tie it."""
    pairs = {model.name: _names(model, family) for model in models}
    heads = {head for model in models if (head := pairs[model.name][1]) is not None and head in model.tensors}
    tied = [model.name for model in models if _says_tied(model.config, family)]
    bare = [m.name for m in models if not heads & m.tensors.keys() and (m.name in tied or _is_silent(m.config, family))]
    if len(heads) != 1:
        return tuple(models), []
    head = heads.pop()
    if len(tied) == len(models):  # the stored copies are the embedding
        return tuple(_without(model, head, family) for model in models) if bare else tuple(models), []
    if not tied and not bare:
        return tuple(models), []
    found = []
    for model in models:
        embedding = pairs[model.name][0] or ""
        tensors = dict(model.tensors)
        if model.name in bare and embedding in tensors:
            tensors[head] = tensors[embedding]
        found.append(replace(model, tensors=tensors, config=_tied(model.config, family, False)))
    names = ", ".join(dict.fromkeys((*tied, *bare)))
    return tuple(found), [f"the result has a head of its own, {head}: that of {names} is the embedding"]


def _names(model: Checkpoint, family: Family | None) -> tuple[str | None, str | None]:
    """Return the names of embedding and head; of unknown families those that are stored, if their names are usual."""
    if family is not None:
        by_role = {rule.role: rule.name for rule in family.tensors}
        return by_role.get("embedding"), by_role.get("head")
    found = []
    for pattern in (_EMBEDDING, _HEAD):
        names = [name for name in model.tensors if pattern.fullmatch(name)]
        found.append(names[0] if len(names) == 1 else None)
    return found[0], found[1]


def _said(config: Mapping[str, Any], family: Family | None) -> list[bool]:
    """Return the values at the places in config.json that transformers' versions read."""
    places = (config, config.get(nested_key(config, family)))
    return [bool(place[_KEY]) for place in places if isinstance(place, Mapping) and place.get(_KEY) is not None]


def _says_tied(config: Mapping[str, Any], family: Family | None) -> bool:
    """Return whether one of these places, or the family's default, says that the head is the embedding."""
    said = _said(config, family)
    return any(said) if said else bool(normalized_config(config, family).get(_KEY))


def _is_silent(config: Mapping[str, Any], family: Family | None) -> bool:
    """Return whether only the code of a family that moerge does not know says whether the head is the embedding."""
    return family is None and not _said(config, family)


def _tied(config: Mapping[str, Any], family: Family | None, tied: bool) -> dict[str, Any]:
    """The config with all places saying the same, where they do not."""
    key = nested_key(config, family)
    inner = config.get(key)
    if set(_said(config, family)) <= {tied} and bool(normalized_config(config, family).get(_KEY)) == tied:
        return dict(config)
    if not isinstance(inner, Mapping):
        return {**config, _KEY: tied}
    return {**config, _KEY: tied, key: {**inner, _KEY: tied}}


def _without(model: Checkpoint, head: str, family: Family | None) -> Checkpoint:
    tensors = {name: tensor for name, tensor in model.tensors.items() if name != head}
    return replace(model, tensors=tensors, config=_tied(model.config, family, True))


def _renamed(name: str, head: str, embedding: str | None) -> str:
    return embedding if name == head and embedding is not None else name


def _same(first: Tensor, second: Tensor) -> bool:
    """Return whether two tensors have the same values; they are read piece by piece, up to the first difference."""
    if first is second or first.shape != second.shape:
        return first is second
    pair = [(tensor, tensor.open()) for tensor in (first, second)]
    for start in range(0, first.size, _PIECE):
        count = min(_PIECE, first.size - start)
        pieces = [elements.read(start, np.empty(count, tensor.dtype.storage)) for tensor, elements in pair]
        if first.dtype is not second.dtype:
            pieces = [_floats(piece, tensor) for piece, (tensor, _) in zip(pieces, pair, strict=True)]
        if pieces[0].tobytes() != pieces[1].tobytes():
            return False
    return True


def _floats(piece: np.ndarray, tensor: Tensor) -> np.ndarray:
    values = np.empty(piece.size, np.float32)
    decode(piece, tensor.dtype, values)
    return values
