"""Print results of `moerge extend`."""

from __future__ import annotations

from moerge.cli.console import Table, print_json, say, show_table
from moerge.cli.views import merging
from moerge.extension import ExtendResult


def extended(result: ExtendResult, *, quiet: bool, as_json: bool) -> None:
    """Print the affinities, the decision, and what was written."""
    if as_json:
        print_json(result.to_json())
        return
    decision = result.decision
    if decision is not None and not quiet:
        table = Table("expert", *decision.by_part, "all")
        for label, value in decision.affinities.items():
            parts = (decision.by_part[part].get(label) for part in decision.by_part)
            table.add_row(label, *("" if one is None else f"{one:.3f}" for one in parts), f"{value:.3f}")
        show_table(table)
        against = "no pair of experts to compare with" if decision.threshold is None else f"threshold {decision.threshold:.3f}"
        outcome = f"merged into {decision.nearest}" if decision.merges else "added as an expert"
        say(f"affinity of {result.name} to its nearest, {decision.nearest}: {against}; {outcome}")
    merging.merge(result.merged, quiet=quiet, as_json=False)
