"""A `Progress` that keeps what it receives, and may act on it.

progress = Recorded()                       # progress.totals, progress.done, progress.infos, progress.warnings
progress = Recorded(on_advance=stop)        # stop(amount) is called with every amount
"""

from __future__ import annotations

from collections.abc import Callable

from moerge.progress import Advance, Progress, Unit


class Recorded(Progress):
    """Phases as (name, total, unit), amounts by unit, facts and warnings."""

    def __init__(self, on_advance: Callable[[int], object] = lambda amount: None) -> None:
        self.phases: list[tuple[str, int, Unit]] = []
        self.done: dict[str, int] = {}
        self.infos: list[str] = []
        self.warnings: list[str] = []
        self._on_advance = on_advance

    def phase(self, name: str, total: int, unit: Unit = "bytes") -> Advance:
        self.phases.append((name, total, unit))

        def advance(amount: int) -> None:
            self.done[unit] = self.done.get(unit, 0) + amount
            self._on_advance(amount)

        return advance

    def totals(self, unit: Unit) -> list[int]:
        """Totals of the phases of this unit."""
        return [total for _, total, counted in self.phases if counted == unit]

    def info(self, text: str) -> None:
        self.infos.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)
