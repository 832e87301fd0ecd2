"""The result of a comparison, as `compare.json` holds it, and the files that `--out` writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from moerge import figures
from moerge.checkpoint.manifest import to_json
from moerge.comparison.advice import MergeAdvice, assess, recommend
from moerge.comparison.charts import charts
from moerge.comparison.similarity import Expert, Pair, Similarity
from moerge.files import atomic_write
from moerge.results import Result


class Comparison(Result):
    """The similarity of a recipe's experts, and advice on merging them; `pairs` and `rows` are flat.

    `models` are locations by name, the base first where there is one. `separate` are the roles that the recipe keeps separate,
    `ignored_advice` those that should stay separate and that it merges.
    """

    recipe: str
    models: Mapping[str, str]
    experts: tuple[str, ...]
    compared: Literal["task vectors", "parameters"]
    densities: tuple[float, ...] = ()
    separate: tuple[str, ...] = ()
    ignored_advice: tuple[str, ...] = Field(default=(), validation_alias="unheeded", serialization_alias="unheeded")
    advice: str
    verdicts: tuple[MergeAdvice, ...]
    pairs: tuple[Pair, ...]
    rows: tuple[Expert, ...]
    warnings: tuple[str, ...] = ()

    @property
    def similarity(self) -> Similarity:
        """Return the figures without the advice."""
        return Similarity(self.experts, self.compared == "task vectors", self.densities, self.pairs, self.rows)


def comparison_of(
    similarity: Similarity, *, recipe: str, models: Mapping[str, str], separate: Sequence[str], warnings: Sequence[str]
) -> Comparison:
    """Figures with the advice that follows from them."""
    verdicts = assess(similarity)
    apart = (verdict.role for verdict in verdicts if verdict.answer == "keep separate")
    return Comparison(
        recipe=recipe,
        models=models,
        experts=similarity.experts,
        compared="task vectors" if similarity.anchored else "parameters",
        densities=similarity.densities,
        separate=tuple(separate),
        ignored_advice=tuple(role for role in apart if role not in separate),
        advice=recommend(similarity, verdicts),
        verdicts=verdicts,
        pairs=similarity.pairs,
        rows=similarity.rows,
        warnings=tuple(warnings),
    )


def write_comparison(comparison: Comparison, folder: Path) -> tuple[Path, ...]:
    """Write `compare.json`, `verdict.csv`, `pairs.csv`, `experts.csv`, and figures where matplotlib is installed.

    Returns the files' paths. The folder is made if need be. Raises MachineError if they cannot be written.
    """
    data = comparison.to_json()
    files = {folder / "compare.json": to_json(data)}
    for name, key in (("verdict", "verdicts"), ("pairs", "pairs"), ("experts", "rows")):
        files[folder / f"{name}.csv"] = figures.as_csv(data[key]).encode()
    for path, content in files.items():
        atomic_write(path, content)
    written = list(files)
    if figures.available():
        for name, chart in charts(comparison.similarity).items():
            written += figures.save(chart.draw(), folder, name, chart.title, chart.description)
    return tuple(written)
