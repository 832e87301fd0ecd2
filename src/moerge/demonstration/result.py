"""Results of the demo: one row of perplexities for each model, as a table, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moerge.demonstration.text import DOMAINS
from moerge.results import Amount, Data, Result

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (*DOMAINS, "mean")
TITLE = "Held-out perplexity (lower is better, * is the best of its column)"
FOOTNOTE = (
    "The mean is geometric. All models share one tokenizer, so their perplexities compare. The experts in the MoEs are "
    "trained, their routers are not: a random router sends tokens to experts without regard to what they are about."
)


class DemoModel(Data):
    """One model: its folder inside the demo's, its kind (base, expert, dense or moe), and its perplexity on each of `COLUMNS`."""

    model: str
    kind: str
    perplexity: Mapping[str, Amount]


def demo_model(model: str, kind: str, by_domain: Mapping[str, float]) -> DemoModel:
    """A model with the geometric mean of its perplexities."""
    mean = math.exp(sum(map(math.log, by_domain.values())) / len(by_domain))
    return DemoModel(model=model, kind=kind, perplexity={**by_domain, "mean": mean})


class DemoResult(Result):
    """All models, and the seconds that each phase took."""

    out: Path = Path()
    seed: int
    models: tuple[DemoModel, ...]
    seconds: Mapping[str, float] = {}

    def to_markdown(self) -> str:
        """The table and its footnote."""
        lines = [
            f"## {TITLE}",
            "",
            "| model | kind | " + " | ".join(COLUMNS) + " |",
            "|---|---|" + "---:|" * len(COLUMNS),
            *(f"| {row.model} | {row.kind} | " + " | ".join(self._values(row)) + " |" for row in self.models),
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
        for row, following in zip(self.models, (*self.models[1:], None), strict=True):
            ends_section = following is None or row.kind not in {following.kind, "base"}
            table.add_row(row.model, *self._values(row), end_section=ends_section)
        return table

    def _values(self, row: DemoModel) -> Iterator[str]:
        for column, value in row.perplexity.items():
            best = value == min(other.perplexity[column] for other in self.models)
            yield f"{value:.2f}" + ("*" if best else " ")
