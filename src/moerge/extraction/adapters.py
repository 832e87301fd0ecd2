"""A recipe whose result is an adapter: several adapters, or models, merged into one (`output: adapter`)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerge.checkpoint.adapter import AdaptedCheckpoint
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.extraction.extract import DEFAULT_RANK, Wanted, extract_plan
from moerge.extraction.result import Extraction
from moerge.files import target_of
from moerge.planning.build import build_plan
from moerge.planning.merged import MergedCheckpoint
from moerge.planning.plan import Plan
from moerge.progress import Progress
from moerge.recipe import Recipe, load_recipe
from moerge.tensors.views.joined import Joined
from moerge.tensors.views.low_rank import LowRankTensor
from moerge.tensors.views.reshaped import Reshaped

_KEY = "output: adapter"


def merge_adapters(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress | bool = False,
) -> Extraction:
    """Merge the recipe's experts by its method, and write what that changes of the base as a LoRA: one adapter of several.

    Ranks and targets of the experts may differ. What is merged are their task vectors (scale * B @ A), never A and B by
    themselves; each merged matrix becomes its truncated singular value decomposition, computed one after the other. What an
    adapter stores whole is merged and stored whole.

    Args:
        recipe: With `output: adapter`, or `output` with a `rank` (default: the largest of the adapters') or an `energy`.
        out: The adapter's folder.
        seed: Replaces the recipe's seeds.
        threads: Default: the cores available. The result does not depend on them.
        progress: A `Progress`, or True for a display on standard error.

    Returns:
        What the adapter keeps of the merged task vector.

    Raises:
        InputError: if the recipe does not make a dense model on a base, or `out` exists.
    """
    begun = time.perf_counter()
    recipe = load_recipe(recipe, seed=seed)
    _check(recipe)
    assert recipe.output is not None and recipe.base is not None
    plan = build_plan(_of_merged(recipe), weights=True)
    inner = _merged_plan(plan)
    matrices, whole = _changed(inner)
    rank = recipe.output.rank or (_largest_rank(inner) if recipe.output.energy is None else None)
    wanted = Wanted(rank, recipe.output.energy, tuple(matrices or ()), tuple(whole), recipe.output.dtype, exact=True)
    base = recipe.folder / Path(recipe.base).expanduser()
    location = str(base) if base.exists() else recipe.base
    merged = f"{recipe.method.name} of {', '.join(recipe.experts)}"
    return extract_plan(plan, target_of(out), wanted, location, merged, begun, threads=threads, progress=progress)


def _check(recipe: Recipe) -> None:
    where = f"{recipe.source}: {_KEY}"
    if recipe.output is None:
        raise InputError(f"{recipe.source} has no '{_KEY}': add it, or use merge")
    if recipe.base is None:
        raise InputError(f"{where} needs a 'base', the model that the adapter is for")
    if recipe.moe is not None or recipe.slices:
        raise InputError(f"{where} is for dense models: remove {'moe' if recipe.moe else 'slices'!r}")
    if "base" in recipe.recipes or recipe.base_adapter:
        raise InputError(
            f"{where} needs a base that is a model by itself, for the adapter to be put on: merge it into a folder first"
        )


def _of_merged(recipe: Recipe) -> Recipe:
    """A recipe of one expert: the merged model, in float32, so that no rounding is taken for a change."""
    inner = recipe.model_copy(update={"output": None, "dtype": "float32"})
    outer = {"base": recipe.base, "experts": {"expert": "merged"}, "merge": {"method": "task_arithmetic"}, "config": "base"}
    tokenizer = {"tokenizer": "base"} if recipe.tokenizer else {}
    recipes = {"expert": inner, **{name: other for name, other in recipe.recipes.items() if name == "base"}}
    return load_recipe({**outer, **tokenizer}).model_copy(
        update={"folder": recipe.folder, "source": recipe.source, "recipes": recipes}
    )


def _merged_plan(plan: Plan) -> Plan:
    merged = next(model for model in plan.models if model.name == "expert")
    assert isinstance(merged, MergedCheckpoint)
    return merged.plan


def _changed(plan: Plan) -> tuple[list[str] | None, list[str]]:
    """The names of tensors that adapters change by a product, and that they store whole; None if an expert is no adapter."""
    products: dict[str, None] = {}
    whole: dict[str, None] = {}
    for model in plan.models[1:]:
        if not isinstance(model, AdaptedCheckpoint) or model.base.name == model.name:
            return None, []
        for name, tensor in _own(model).items():
            if _is_product(tensor) and len(tensor.shape) > 1:
                products[name] = None
            elif not _is_product(tensor):
                whole[name] = None
    return [name for name in products if name not in whole], list(whole)


def _own(model: AdaptedCheckpoint) -> dict[str, Any]:
    return {name: tensor for name, tensor in model.tensors.items() if tensor is not model.base.tensors.get(name)}


def _is_product(tensor: Any) -> bool:
    return any(isinstance(part, LowRankTensor) for part in _parts(tensor))


def _parts(tensor: Any) -> list[Any]:
    """The tensor without what gives it another shape: a matrix, or that of each expert."""
    if isinstance(tensor, Joined):
        return [part.tensor for part in tensor.parts]
    return [tensor.of if isinstance(tensor, Reshaped) else tensor]


def _largest_rank(plan: Plan) -> int:
    """peft's own choice: the largest rank of the adapters."""
    ranks = [rank for model in plan.models for rank in _ranks(model)]
    return max(ranks, default=DEFAULT_RANK)


def _ranks(model: Checkpoint) -> list[int]:
    if not isinstance(model, AdaptedCheckpoint):
        return []
    parts = (part for tensor in model.tensors.values() for part in _parts(tensor))
    return [part.a.shape[0] for part in parts if isinstance(part, LowRankTensor) and part.a is not None]
