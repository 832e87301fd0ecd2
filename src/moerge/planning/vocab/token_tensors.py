"""The tensors with a row for each token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from moerge.errors import InputError
from moerge.planning.models import SourceModel

_USUAL = re.compile(r"(.*\.)?(embed_tokens|wte|embed_in|tok_embeddings|word_embeddings|embed_out|lm_head|output)\.(weight|bias)")
"""What embeddings and heads are called, for models of a family that moerge does not know."""


def sizes_of(models: Sequence[SourceModel]) -> dict[str, Any]:
    """Each model's vocab_size, the number of rows in its embedding, as its config has it, right or wrong."""
    return {model.name: _size(model) for model in models}


def _size(model: SourceModel) -> Any:
    size = model.config.get("vocab_size")
    if size is None and model.family is None:
        usual = (tensor for name, tensor in model.tensors.items() if _USUAL.fullmatch(name) and tensor.shape)
        size = next((tensor.shape[0] for tensor in usual), None)
    return size


def token_tensors(models: Sequence[SourceModel], sizes: Mapping[str, Any]) -> frozenset[str]:
    """The names of tensors whose rows are tokens: by the family's table, or by their usual names where there is none.

    Raises InputError for a model where they have another number of rows than its config says, and if that cannot be told.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise InputError(f"{name}: config.json: vocab_size should be a positive whole number, not {size!r}")
    everywhere = set.intersection(*(set(model.tensors) for model in models))
    names = frozenset(name for name in everywhere if _has_token_rows(name, models, sizes))
    if not names:
        raise InputError(
            f"the vocabularies differ, and no tensor of {models[0].name} is known to have a row for each token: "
            "expected an embedding, such as 'model.embed_tokens.weight'",
            code="vocabularies-differ",
        )
    for model in models:
        for name in sorted(names):
            shape = model.tensors[name].shape
            if shape[0] != sizes[model.name]:
                wanted = [sizes[model.name], *shape[1:]]
                raise InputError(f"{model.name}: tensor {name!r} has shape {list(shape)}, expected {wanted}")
    return names


def _has_token_rows(name: str, models: Sequence[SourceModel], sizes: Mapping[str, int]) -> bool:
    first, family = models[0], models[0].family
    if family is not None and family.role_of(name) is not None:
        table_name = family.canonical_name(name)
        rules = [rule for rule in family.tensors if rule.shape[:1] == ("vocab",) and rule.applies(first.config)]
        return any(rule.name == table_name for rule in rules) and bool(first.tensors[name].shape)
    if any(model.tensors[name].shape[:1] != (sizes[model.name],) for model in models):
        return False
    usual = _USUAL.fullmatch(name) is not None
    if family is None and not usual:
        raise InputError(
            f"the vocabularies differ, and tensor {name!r} has as many rows as there are tokens: whether its rows are tokens is "
            f"not known for models of type {first.model_type!r}",
            code="vocabularies-differ",
        )
    return usual
