"""The vocabulary's part of config.json: its size and the ids of special tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moerge.planning.models import SourceModel

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def with_special_ids(
    models: Sequence[SourceModel],
    source: str,
    config_source: str,
    *,
    moved: Mapping[int, int] | None = None,
    vocab_size: int | None = None,
) -> tuple[SourceModel, ...]:
    """The models with the ids of the special tokens of `source`, whose tokenizer the result has, in their configs.

    What its config lacks is that of `config_source`, by the ids that `moved` gives its tokens in the result; a token without
    one is left out. `vocab_size` is the result's, if that changes.
    """
    by_name = {model.name: model for model in models}
    changes: dict[str, Any] = {} if vocab_size is None else {"vocab_size": vocab_size}
    for key in SPECIAL_IDS if source != config_source else ():
        given, own = by_name[source].find_key(key), by_name[config_source].find_key(key)
        if given is not None:
            changes[key] = given
        elif own is not None and moved is not None:
            changes[key] = _moved(own, moved)
    return tuple(model.with_values(changes) for model in models)


def _moved(value: Any, moved: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [moved[number] for number in value if type(number) is int and number in moved] or None
    return moved.get(value) if type(value) is int else None
