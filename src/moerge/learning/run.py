"""`moerge learn`: coefficients first, then an ordinary merge with them."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge import figures
from moerge.errors import InputError
from moerge.extras import require
from moerge.files import check_unchanged, target_of
from moerge.formatting import Displayed
from moerge.learning import coefficient_figure
from moerge.merging.pipeline import MergeResult, check_start, merge
from moerge.methods.coefficients import Coefficients as CoefficientsMethod
from moerge.planning.build import build_plan, located
from moerge.planning.kinds import is_heterogeneous
from moerge.progress import Progress, reporter
from moerge.recipe import load_recipe
from moerge.recipe.coefficients import FILE, Coefficients
from moerge.recipe.learned import Learnt
from moerge.recipe.learning import Learning
from moerge.recipe.schema import Recipe

if TYPE_CHECKING:
    from moerge.learning.flow import Learned

CURVE, FIGURE = "learning.csv", "coefficients.svg"


@dataclass(frozen=True, repr=False)
class LearnResult(Displayed):
    """A finished checkpoint, and the coefficients that it was merged with."""

    merged: MergeResult
    coefficients: Coefficients
    stages: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            **self.merged.to_json(),
            "coefficients": str(self.merged.folder / FILE),
            "mean_coefficients": self.coefficients.means(),
            "initial": self.coefficients.fixed,
            "stages": list(self.stages),
            "warnings": [*self.merged.plan.warnings, *self.warnings],
        }


def learn(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    force: bool = False,
    progress: Progress | bool = False,
) -> LearnResult:
    """Learn coefficients as the recipe's `learn` section says, merge with them, and write the checkpoint folder `out`.

    The folder also gets the coefficients, the learning curve, and a figure where matplotlib is installed. Should the merge
    fail, the coefficients stay beside it, and only `force` replaces them. Raises InputError for bad input, MachineError for a
    full or failing disk.
    """
    require("models", "learning")
    from moerge.learning.flow import learn_coefficients
    from moerge.learning.merged_parameters import check_recipe
    from moerge.runtime.loading import usable_device

    recipe = load_recipe(recipe)
    if recipe.output is not None:
        raise InputError(f"{recipe.source}: output: learned merges are models, not adapters: remove it, and extract one from OUT")
    target, settings = target_of(out), recipe.learn or Learning()
    if recipe.moe is not None and recipe.moe.by_sequence and is_heterogeneous(recipe, located(recipe)):
        raise InputError(
            f"{recipe.source}: experts that stay whole models have no coefficients to learn: merge them with `moerge merge` and "
            "fine-tune the result with `moerge tune`"
        )
    check_recipe(recipe)
    usable_device(settings.device, f"{recipe.source}: learn.device")
    whole = build_plan(recipe, weights=True)
    check_start(whole, target, resume=False, force=force)
    kept = target.with_name(f"{target.name}.{FILE}")
    if os.path.lexists(kept) and not force:
        raise InputError(
            f"{kept} lies there, perhaps from a merge that failed: merge with it (method: coefficients), move it away, or "
            "replace it with --force"
        )
    dense = whole if recipe.moe is None else build_plan(recipe.model_copy(update={"moe": None}), weights=True)
    with reporter(progress) as report:
        learned = learn_coefficients(recipe, dense, settings, report)
    learned.coefficients.write(kept)
    plan = build_plan(with_coefficients(recipe, learned.coefficients), weights=True)
    check_unchanged(whole.sources)
    plan = replace(
        plan,
        files={**plan.files, **_files(learned)},
        calibration=(*plan.calibration, *learned.texts),
        warnings=(*plan.warnings, *learned.warnings),
    )
    merged = merge(plan, target, force=force, progress=report)
    kept.unlink()
    return LearnResult(merged, learned.coefficients, tuple(learned.coefficients.learning["stages"]), learned.warnings)


def with_coefficients(recipe: Recipe, found: Coefficients) -> Recipe:
    """The recipe, merged with coefficients instead of its own method; as written, it finds them beside itself."""
    method = CoefficientsMethod(file=FILE)
    written = {key: value for key, value in recipe.written.items() if key != "learn"}
    written["merge"] = {"method": method.name, "file": FILE}
    changes = {"method": method, "learned": Learnt(found, method), "written": written, "learn": None}
    return recipe.model_copy(update=changes)


def _files(learned: Learned) -> dict[str, bytes]:
    found = {CURVE: _curve(learned)}
    if figures.available():
        means = ", ".join(f"{expert} {mean:.3g}" for expert, mean in learned.coefficients.means().items())
        picture = coefficient_figure.draw(coefficient_figure.table(learned.coefficients))
        found[FIGURE] = figures.encoded(picture, "svg", "Learned coefficients by layer", f"Means: {means}.")
    return found


def _curve(learned: Learned) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["stage", "update", "train", "heldout", "learning_rate"], lineterminator="\n")
    writer.writeheader()
    for stage, history in enumerate(learned.stages, 1):
        writer.writerows({"stage": stage, **row} for row in history.rows)
    return text.getvalue().encode()
