"""The parts of a model that mergekit merges apart (`modules`), and which of its tensors belong to which.

mergekit 0.1.5 has the names of a table for each type of model (`_data/architectures`), or the beginnings of tensors' names where
it has no table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

REST = ("text_decoder", "default")
"""Modules that have what belongs to no other one."""
_PROJECTOR = r"multi_modal_projector|mm_projector|embed_vision|visual\.(merger|deepstack_merger_list)"
_VISION = r"vision_tower|vision_model|vision_encoder|visual"
_NAMED = {"multi_modal_projector": _PROJECTOR, "vision_tower": _VISION, "vision_model": _VISION}


def module_of(name: str, modules: Sequence[str]) -> str | None:
    """The module among `modules` that a tensor belongs to; None where it belongs to none of them."""
    if len(modules) == 1:
        return modules[0]
    narrow_first = sorted(modules, key=lambda module: (module != "multi_modal_projector", module in REST))
    return next((module for module in narrow_first if module in REST or _has(module, name)), None)


def _has(module: str, name: str) -> bool:
    pattern = _NAMED.get(module)
    if pattern is None:
        return f"{name}.".startswith((f"{module}.", f"model.{module}."))
    return re.match(rf"(model\.)?({pattern})\.", name) is not None
