"""The content of search.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from moerge.formatting import as_time
from moerge.results import Data, Result

State = Literal["complete", "pruned", "failed"]


class Trial(Data):
    """A point that was tried. `values` are of the objectives, `figures` their domains; `merged` counts tensors."""

    number: int
    state: State
    point: dict[str, Any]
    values: list[float] | None = None
    figures: dict[str, dict[str, float]] = {}
    merged: int = 0
    seconds: float = 0.0
    reason: str | None = None


class Judged(Data):
    """A merge on text that was not searched on. `difference` is against the recipe as it was, with a paired 95% interval."""

    name: str
    metric: str
    domain: str
    documents: int
    value: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None


class SearchResult(Result):
    """A search: every trial, the winner and how it does on other text."""

    recipe: str
    objectives: list[str]
    parameters: dict[str, Any]
    sampler: str
    seed: int
    trials: list[Trial]
    best: int
    pareto: list[int]
    importance: dict[str, float]
    judged: list[Judged]
    seconds: float
    finished: bool

    @property
    def winner(self) -> Trial:
        """The best trial."""
        return next(trial for trial in self.trials if trial.number == self.best)

    def headline(self) -> str:
        """The best value and where it is."""
        values = ", ".join(f"{name} {value:.4g}" for name, value in zip(self.objectives, self.winner.values or [], strict=True))
        done = sum(trial.state == "complete" for trial in self.trials)
        return f"{values} at {shown(self.winner.point)}, best of {done} trials in {as_time(self.seconds)}"

    def figures(self) -> Mapping[str, Any]:
        """The winner's parameters."""
        return self.winner.point


def shown(point: Mapping[str, Any]) -> str:
    """A point on a line."""
    return ", ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in point.items())
