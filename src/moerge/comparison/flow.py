"""`moerge compare` from a recipe to a verdict; start reading at `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moerge.comparison.compared import compared_plan
from moerge.comparison.result import Comparison, comparison_of
from moerge.comparison.similarity import measure, summarize, work_bytes
from moerge.errors import InputError
from moerge.files import check_unchanged
from moerge.progress import Progress, reporter
from moerge.recipe import Recipe, load_recipe
from moerge.tensors.threads import default_threads


def compare(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    density: float | None = None,
    threads: int | None = None,
    progress: Progress | bool = False,
) -> Comparison:
    """Compare a recipe's experts tensor by tensor, without merging them.

    `density` is what TIES is asked about, in (0, 1], by default the recipe's, or 1 where its method has none. Memory is that of a
    few blocks for each thread; the figures do not depend on `threads`. `progress` is a
    `Progress`, or True for a display on standard error. Raises InputError for models that cannot be merged, NaN and infinity.
    """
    if density is not None and not 0 < density <= 1:
        raise InputError(f"the density {density} is not in (0, 1]")
    loaded = load_recipe(recipe)
    plan = compared_plan(loaded, density=density)
    if not plan.complete:  # only now, since a download may take hours
        commits = {model.name: model.revision for model in plan.models}
        plan = compared_plan(loaded, density=density, weights=True, commits=commits)
    with reporter(progress) as report:
        advance = report.phase("comparing", work_bytes(plan))
        similarity = summarize(plan, measure(plan, threads or default_threads(), advance))
    check_unchanged(plan.sources)
    models = {model.name: model.location for model in plan.models}
    separate = loaded.moe.separate if loaded.moe else ()
    return comparison_of(similarity, recipe=loaded.source, models=models, separate=separate, warnings=plan.warnings)
