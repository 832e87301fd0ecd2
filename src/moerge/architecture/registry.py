"""Families and MoE formats by name, built-in and from other packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.architecture.family import Family, MoEFormat
from moerge.errors import InputError
from moerge.registry import Registry

FAMILIES: Registry[Family] = Registry("moerge.families", "family")
MOE_FORMATS: Registry[MoEFormat] = Registry("moerge.moe_formats", "MoE format")


def family_of(config: Mapping[str, Any]) -> Family | None:
    """The family of a config by its `model_type`, None if moerge knows none."""
    return FAMILIES.find(str(config.get("model_type", "")))


def known_families() -> list[str]:
    """Model types that moerge knows the roles of."""
    return FAMILIES.names()


def moe_formats() -> list[str]:
    """Names of all token-routed MoE formats."""
    return MOE_FORMATS.names()


def moe_format(name: str, model_type: str) -> MoEFormat:
    """The MoE format called `name`, or with "auto" the one that experts of this model type map to exactly.

    Raises InputError if there is none.
    """
    if name != "auto":
        chosen = MOE_FORMATS.get(name)
        if model_type not in chosen.sources:
            raise InputError(
                f"moe.format: experts of type {model_type!r} do not map to {name} exactly "
                f"(it takes: {', '.join(sorted(chosen.sources))})"
            )
        return chosen
    formats = [MOE_FORMATS.get(known) for known in MOE_FORMATS.names()]
    for candidate in formats:
        if model_type in candidate.sources:
            return candidate
    takes = sorted({source for candidate in formats for source in candidate.sources})
    raise InputError(f"no token-routed MoE format is known for experts of type {model_type!r} (known: {', '.join(takes)})")
