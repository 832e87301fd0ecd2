"""Print results of `moerge learn`."""

from __future__ import annotations

from moerge.cli.console import Table, print_json, say, show_table
from moerge.cli.views import merging
from moerge.learning.run import LearnResult


def note(text: str) -> None:
    """A fact before the work starts, on standard error."""
    say(text, stderr=True, soft_wrap=True)


def learned(result: LearnResult, *, quiet: bool, as_json: bool) -> None:
    """Print the mean coefficients, how learning went, and what was merged."""
    if as_json:
        print_json(result.to_json())
        return
    merging.merge(result.merged, quiet=quiet, as_json=False)
    if quiet:
        return
    table = Table("expert", "mean coefficient")
    for expert, mean in result.coefficients.means().items():
        table.add_row(expert, f"{mean:.3f}")
    show_table(table)
    for number, stage in enumerate(result.stages, 1):
        rows = stage["updates"]
        kept = f"update {stage['best_update']} of {rows[-1]['update'] if rows else 0} was kept"
        heldout = [row["heldout"] for row in rows if "heldout" in row]
        losses = f", held-out objective {heldout[0]:.4g} -> {min(heldout):.4g}" if heldout and heldout[0] < float("inf") else ""
        early = ", stopped early" if stage["stopped_early"] else ""
        say(f"stage {number}: {kept}{losses}{early}")
