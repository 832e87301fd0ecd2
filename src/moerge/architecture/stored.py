"""A family as a checkpoint stores it: other classes of the same family have no head, or other names before their layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from moerge.architecture.config import normalized_config
from moerge.architecture.family import Family, TensorRule, expected_tensors
from moerge.architecture.registry import family_of

_MOST = 0.9
_WRAPPERS = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What torch.compile and FSDP put into names; no model of transformers has it."""


def stored_family(config: Mapping[str, Any], names: Collection[str]) -> Family | None:
    """The family of a checkpoint with tensors of these names, None if moerge knows none.

    Its table has the names that the checkpoint has, and a head only if its class has one: an embedding, reward or
    classification model has none, and what it has instead is merged by name.
    """
    family = family_of(config)
    if family is None:
        return None
    own, stored = body_prefix(family), _stored_prefix(family, names)
    if stored != own:
        family = replace(family, tensors=tuple(replace(rule, name=_moved(rule, own, stored)) for rule in family.tensors))
    if is_causal(config, family):
        return family
    canonical = {family.canonical_name(name) for name in names}
    kept = tuple(rule for rule in family.tensors if not rule.role.startswith("head") or rule.name in canonical)
    return replace(family, tensors=kept, unmodeled=(*family.unmodeled, r"(?!.*\.\d+\.).*"))


def fits(family: Family, config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Return whether a checkpoint has the tensors of a derived table, a few aside: others are not stored as transformers does."""
    canonical = {family.canonical_name(name) for name in names}
    try:
        expected = expected_tensors(family, normalized_config(config, family))
    except ValueError:
        return False
    return sum(tensor.name in canonical for tensor in expected) >= _MOST * len(expected)


def is_causal(config: Mapping[str, Any], family: Family) -> bool:
    """Return whether a checkpoint is of its family's own class, which has a head, or does not say."""
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else named
    return not isinstance(first, str) or first == family.architecture


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Names without what wrappers put into them, by the names that are stored."""
    plain = {name: _WRAPPERS.sub("", name) for name in names}
    if plain and all(name.startswith("module.") for name in plain.values()):
        return {stored: name.removeprefix("module.") for stored, name in plain.items()}
    return plain


def body_prefix(family: Family) -> str:
    """Return the prefix of the names of embedding and layers."""
    embedding = next(rule.name for rule in family.tensors if rule.role == "embedding")
    layer = next(rule.name for rule in family.tensors if "{layer}" in rule.role)
    shared = 0
    while embedding[shared] == layer[shared]:
        shared += 1
    return embedding[: embedding.rfind(".", 0, shared) + 1]


def _stored_prefix(family: Family, names: Collection[str]) -> str:
    own = body_prefix(family)
    embedding = next(rule.name for rule in family.tensors if rule.role == "embedding")
    canonical = {family.canonical_name(name) for name in names}
    if embedding in canonical:
        return own
    suffix = embedding.removeprefix(own)
    found = sorted((name for name in canonical if name == suffix or name.endswith(f".{suffix}")), key=len)
    return found[0].removesuffix(suffix) if found else own


def _moved(rule: TensorRule, own: str, stored: str) -> str:
    return stored + rule.name.removeprefix(own) if rule.name.startswith(own) else rule.name
