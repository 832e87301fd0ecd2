"""A decoder-only language model as a whole: where its input embedding and its head are, and what lies between them.

Families that moerge knows are read from their tables; of all others transformers says it, from a model without values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture.config import normalized_config
from moerge.architecture.decoder import DecoderInterface, not_decoder
from moerge.architecture.family import Family, expected_tensors
from moerge.architecture.registry import tabled_family
from moerge.architecture.stored import body_prefix
from moerge.errors import InputError

_OTHER_KINDS = {
    "ForMaskedLM": "an encoder",
    "ForSequenceClassification": "a classifier",
    "ForTokenClassification": "a classifier",
    "ForQuestionAnswering": "a model that marks answers in a text",
}
"""What a class name ends with that is no language model, and what to call it."""


def decoder_interface(config: Mapping[str, Any], where: str) -> DecoderInterface:
    """The outside of the model with this config.json, whose owner messages call `where`.

    Raises InputError for what is no decoder-only language model, for one that needs code of its own, and where transformers
    is needed to say more and is not installed.
    """
    check_kind(config, where)
    family = tabled_family(config)
    if family is None:
        from moerge.architecture.decoder_transformers import decoder_from_transformers

        return decoder_from_transformers(config, where)
    return _by_table(family, config, normalized_config(config, family), where)


def check_kind(config: Mapping[str, Any], where: str) -> None:
    """InputError for a config that says itself that this is no decoder-only language model."""
    kind = str(config.get("model_type", ""))
    if not kind:
        raise InputError(f"{where}: config.json has no 'model_type', so its architecture is unknown: fetch or copy it again")
    if config.get("is_encoder_decoder"):
        raise not_decoder(where, kind, "an encoder-decoder")
    named = config.get("architectures") or []
    for name in named if isinstance(named, list) else [named]:
        other = next((what for end, what in _OTHER_KINDS.items() if str(name).endswith(end)), None)
        if other:
            raise not_decoder(where, kind, f"{other} ({name})")


def _by_table(family: Family, config: Mapping[str, Any], known: Mapping[str, Any], where: str) -> DecoderInterface:
    kind = family.model_type
    if family.nested:
        raise InputError(
            f"{where}: {kind!r} is a language model with others beside it, for images or sound: "
            "save its language model as a checkpoint of its own and name that"
        )
    try:
        tensors = tuple(expected_tensors(family, known))
        embedding_scale, logit_scale = family.embedding_scale(known), family.logit_scale(known)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"{where}: config.json: {error}") from None
    by_role = {tensor.role: tensor for tensor in tensors}
    embedding, head, bias = (by_role.get(role) for role in ("embedding", "head", "head.bias"))
    if embedding is None:
        raise InputError(f"{where}: models of type {kind!r} have no input embedding, so they cannot be experts: leave it out")
    rows, width = embedding.shape
    return DecoderInterface(
        kind,
        rows,
        width,
        embedding.name,
        head.name if head else None,
        tensors,
        bias.name if bias else None,
        embedding_scale,
        logit_scale,
        known.get("final_logit_softcapping"),
        prefix=body_prefix(family).removesuffix("."),
    )
