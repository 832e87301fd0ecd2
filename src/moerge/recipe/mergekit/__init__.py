"""mergekit's files as recipes: merges (`mergekit-yaml`) and mixtures of experts (`mergekit-moe`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.recipe.document import Document
from moerge.recipe.mergekit.dense import read_merge
from moerge.recipe.mergekit.moe import read_moe
from moerge.recipe.schema import Recipe

__all__ = ["is_mergekit", "read_mergekit"]


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Return whether a document is one of mergekit's: none of these keys is one of a recipe of ours."""
    return any(key in data for key in ("merge_method", "base_model", "slices", "models", "modules", "gate_mode"))


def read_mergekit(document: Document, *, seed: int | None = None) -> Recipe:
    """Read a mergekit file as a recipe; `seed` replaces its `random_seed`. InputError names the line and key at fault."""
    if seed is not None:
        document.data["random_seed"] = seed
    is_moe = "merge_method" not in document.data and ("experts" in document.data or "gate_mode" in document.data)
    return read_moe(document) if is_moe else read_merge(document)
