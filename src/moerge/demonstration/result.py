"""Results of the demo: one row of perplexities for each model, as a table, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.demonstration.text import DOMAINS
from moerge.formatting import Displayed

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (*DOMAINS, "mean")
TITLE = "Held-out perplexity (lower is better, * is the best of its column)"
FOOTNOTE = (
    "The mean is geometric. All models share one tokenizer, so their perplexities compare. The experts in the MoEs are "
    "trained, their routers are not: a random router sends tokens to experts without regard to what they are about."
)


@dataclass(frozen=True)
class Row:
    """One model: its folder inside the demo's, what it is, and its perplexity on each domain."""

    path: str
    kind: str
    """base, expert, dense or moe."""
    perplexity: Mapping[str, float]

    @property
    def cells(self) -> dict[str, float]:
        """The value of each of `COLUMNS`."""
        mean = math.exp(sum(map(math.log, self.perplexity.values())) / len(self.perplexity))
        return {**self.perplexity, "mean": mean}


@dataclass(frozen=True, repr=False)
class DemoResult(Displayed):
    """All rows, and the seconds that each phase took."""

    out: Path
    seed: int
    rows: tuple[Row, ...]
    seconds: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        models = [{"model": row.path, "kind": row.kind, "perplexity": row.cells} for row in self.rows]
        return {"out": str(self.out), "seed": self.seed, "models": models, "seconds": dict(self.seconds)}

    def to_markdown(self) -> str:
        """The table and its footnote."""
        lines = [
            f"## {TITLE}",
            "",
            "| model | kind | " + " | ".join(COLUMNS) + " |",
            "|---|---|" + "---:|" * len(COLUMNS),
            *(f"| {row.path} | {row.kind} | " + " | ".join(self._values(row)) + " |" for row in self.rows),
            "",
            FOOTNOTE,
        ]
        return "\n".join(lines) + "\n"

    def __rich__(self) -> Table:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(title=TITLE, caption=FOOTNOTE, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
        table.add_column("model", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right", no_wrap=True)
        for row, following in zip(self.rows, (*self.rows[1:], None), strict=True):
            ends_section = following is None or (following.kind != row.kind and row.kind != "base")
            table.add_row(row.path, *self._values(row), end_section=ends_section)
        return table

    def _values(self, row: Row) -> Iterator[str]:
        for column, value in row.cells.items():
            best = value == min(other.cells[column] for other in self.rows)
            yield f"{value:.2f}" + ("*" if best else " ")
