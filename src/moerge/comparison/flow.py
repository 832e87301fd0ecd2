"""`moerge compare` from a recipe to a verdict; start reading at `compare`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge import figures
from moerge.checkpoint.manifest import to_json
from moerge.comparison import charts
from moerge.comparison.compared import compared_plan
from moerge.comparison.similarity import Similarity, measure, summarise, work_bytes
from moerge.comparison.verdict import Verdict, advise, judge
from moerge.errors import InputError
from moerge.files import atomic_write, check_unchanged
from moerge.formatting import Displayed
from moerge.progress import Progress, reporter
from moerge.recipe import Recipe, load_recipe
from moerge.tensors.threads import default_threads


@dataclass(frozen=True, repr=False)
class Comparison(Displayed):
    """The similarity of a recipe's experts, and advice on merging them.

    `models` are locations by name, the base first where there is one. `separate` are the roles that the recipe keeps separate.
    """

    source: str
    models: Mapping[str, str]
    separate: tuple[str, ...]
    similarity: Similarity
    verdicts: tuple[Verdict, ...]
    advice: str
    warnings: tuple[str, ...]

    @property
    def unheeded(self) -> tuple[str, ...]:
        """Roles that should stay separate and that the recipe merges."""
        apart = (verdict.role for verdict in self.verdicts if verdict.answer == "keep separate")
        return tuple(role for role in apart if role not in self.separate)

    def to_json(self) -> dict[str, Any]:
        """All figures; rows are flat."""
        found = self.similarity
        return {
            "recipe": self.source,
            "models": dict(self.models),
            "experts": list(found.experts),
            "compared": "task vectors" if found.anchored else "parameters",
            "densities": list(found.densities),
            "separate": list(self.separate),
            "unheeded": list(self.unheeded),
            "advice": self.advice,
            "verdicts": [verdict.to_json() for verdict in self.verdicts],
            "pairs": [pair.to_json() for pair in found.pairs],
            "rows": [row.to_json() for row in found.rows],
            "warnings": list(self.warnings),
        }

    def write(self, folder: Path) -> tuple[Path, ...]:
        """Write `compare.json`, `verdict.csv`, `pairs.csv`, `experts.csv`, and figures where matplotlib is installed.

        Returns the files' paths. The folder is made if need be. Raises MachineError if they cannot be written.
        """
        data = self.to_json()
        files = {folder / "compare.json": to_json(data)}
        for name, key in (("verdict", "verdicts"), ("pairs", "pairs"), ("experts", "rows")):
            files[folder / f"{name}.csv"] = figures.as_csv(data[key]).encode()
        for path, content in files.items():
            atomic_write(path, content)
        written = list(files)
        if figures.available():
            for name, chart in charts.charts(self.similarity).items():
                written += figures.save(chart.draw(), folder, name, chart.title, chart.description)
        return tuple(written)


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
        similarity = summarise(plan, measure(plan, threads or default_threads(), advance))
    check_unchanged(plan.sources)
    verdicts = judge(similarity)
    return Comparison(
        loaded.source,
        {model.name: model.location for model in plan.models},
        loaded.moe.separate if loaded.moe else (),
        similarity,
        verdicts,
        advise(similarity, verdicts),
        plan.warnings,
    )
