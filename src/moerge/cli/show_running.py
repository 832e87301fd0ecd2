"""Results of running models."""

from __future__ import annotations

from rich.console import Console

from moerge.cli.console import as_percent, new_table, print_json
from moerge.inference.generation import Generation
from moerge.inference.routes import Routes


def generation(found: Generation, *, as_json: bool) -> None:
    """Print what a model wrote, and nothing else."""
    if as_json:
        print_json(found.to_json())
    else:
        print(found.text)


def routes(found: Routes, *, as_json: bool) -> None:
    """Print how texts are routed: for each expert its mean weight, and in brackets how often it is first."""
    if as_json:
        print_json(found.to_json())
        return
    console = Console()
    table = new_table("text", "documents", *found.experts, "entropy", "accuracy")
    for column in table.columns[1:]:
        column.justify = "right"
    for text in found.texts:
        shares = [f"{100 * alpha:.1f} ({100 * first:.0f})" for alpha, first in zip(text.alpha_E, text.first_E, strict=True)]
        table.add_row(text.name, str(text.documents), *shares, f"{text.entropy:.2f}", as_percent(text.accuracy))
    table.add_row("mean", "", *(f"{100 * alpha:.1f}" for alpha in found.load_E), "", as_percent(found.accuracy))
    console.print(table)
    per = "sequences" if found.level == "sequence" else "tokens and layers"
    console.print(
        f"mean weight in %, in brackets the share of {per} for which an expert is first; load balance {found.balance:.2f} "
        f"(1: even, {len(found.experts)}: all to one)",
        highlight=False,
    )
