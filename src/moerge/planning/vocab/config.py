"""The vocabulary's part of config.json: its size and the ids of special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moerge.architecture import Family
from moerge.architecture.config import changed, nested_key
from moerge.checkpoint.reader import Checkpoint

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_special_ids(
    models: Sequence[Checkpoint],
    family: Family | None,
    source: str,
    config_source: str,
    *,
    moved: Mapping[int, int] | None = None,
    vocab_size: int | None = None,
) -> tuple[Checkpoint, ...]:
    """The models with the ids of the special tokens of `source`, whose tokenizer the result has, in their configs.

    What its config lacks is that of `config_source`, by the ids that `moved` gives its tokens in the result; a token without
    one is left out. `vocab_size` is the result's, if that changes.
    """
    by_name = {model.name: model.config for model in models}
    changes: dict[str, Any] = {} if vocab_size is None else {"vocab_size": vocab_size}
    for key in SPECIAL_IDS if source != config_source else ():
        given, own = find_key(by_name[source], family, key), find_key(by_name[config_source], family, key)
        if given is not None:
            changes[key] = given
        elif own is not None and moved is not None:
            changes[key] = _moved(own, moved)
    return with_values(models, family, changes)


def with_values(models: Sequence[Checkpoint], family: Family | None, changes: Mapping[str, Any]) -> tuple[Checkpoint, ...]:
    """The models with other values in their configs; None removes a key."""
    if not changes:
        return tuple(models)
    return tuple(replace(model, config=changed(model.config, family, changes)) for model in models)


def _moved(value: Any, moved: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [moved[number] for number in value if type(number) is int and number in moved] or None
    return moved.get(value) if type(value) is int else None


def _nested(config: Mapping[str, Any], family: Family | None) -> Mapping[str, Any] | None:
    inner = config.get(nested_key(config, family))
    return inner if isinstance(inner, Mapping) else None


def find_key(config: Mapping[str, Any], family: Family | None, key: str) -> Any:
    """A value of the language model's part of a config, or else of the whole."""
    inner = _nested(config, family)
    found = inner.get(key) if inner is not None else None
    return config.get(key) if found is None else found
