"""Families and MoE formats by name, built-in and from other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moerge.architecture.config import normalized_config
from moerge.architecture.derived import derived_family
from moerge.architecture.family import Family
from moerge.architecture.moe_format import MoEFormat
from moerge.architecture.token_mixture import MODEL_TYPE, token_family
from moerge.errors import InputError
from moerge.registry import Registry

FAMILIES: Registry[Family] = Registry("moerge.families", "family")
MOE_FORMATS: Registry[MoEFormat] = Registry("moerge.moe_formats", "MoE format")


def tabled_family(config: Mapping[str, Any]) -> Family | None:
    """The family of a config by its `model_type`, None if moerge has no table of it."""
    return FAMILIES.find(str(config.get("model_type", "")))


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config, derived from transformers where moerge has no table; None where neither knows it."""
    if config.get("model_type") == MODEL_TYPE:
        return token_family(config, family_of)
    return tabled_family(config) or derived_family(config)


def read_config(config: Mapping[str, Any]) -> tuple[Family | None, dict[str, Any]]:
    """The family of a config.json, and the config in its normal form."""
    family = family_of(config)
    return family, normalized_config(config, family)


def known_families() -> list[str]:
    """Model types that moerge has tables of."""
    return FAMILIES.names()


def moe_formats() -> list[str]:
    """Names of all token-routed MoE formats."""
    return MOE_FORMATS.names()


def gate_kind(model_type: str) -> Literal["softmax", "sigmoid"]:
    """Return what makes weights of a router's logits in a mixture of this type."""
    formats = (MOE_FORMATS.get(known) for known in MOE_FORMATS.names())
    return next((known.gate for known in formats if known.family.model_type == model_type), "softmax")


def moe_format(name: str, config: Mapping[str, Any]) -> MoEFormat:
    """The MoE format called `name`, or with "auto" the one that experts with this normalized config map to exactly.

    Raises InputError if there is none, or if it has no place for something that the config calls for.
    """
    model_type = str(config.get("model_type", ""))
    if name != "auto":
        chosen = MOE_FORMATS.get(name)
        if model_type not in chosen.sources:
            raise InputError(
                f"moe.format: experts of type {model_type!r} do not map to {name} exactly "
                f"(it takes: {', '.join(sorted(chosen.sources))})"
            )
        candidates = [chosen]
    else:
        candidates = _candidates(model_type)
    reasons = [candidate.unsupported_reason(config) for candidate in candidates]
    free = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if not reason]
    if not free:
        raise InputError(f"cannot build a {candidates[0].name} model: {reasons[0]}")
    return free[0]


def _candidates(model_type: str) -> list[MoEFormat]:
    """The formats that take experts of this type, the preferred one first."""
    formats = [MOE_FORMATS.get(known) for known in MOE_FORMATS.names()]
    found = [candidate for candidate in formats if model_type in candidate.sources]
    if not found:
        takes = sorted({source for candidate in formats for source in candidate.sources})
        raise InputError(
            f"no token-routed MoE format is known for experts of type {model_type!r} (known: {', '.join(takes)}): "
            "'format: moerge' with 'level: token' routes tokens in any family"
        )
    return sorted(found, key=lambda candidate: model_type in candidate.fallback_for)
