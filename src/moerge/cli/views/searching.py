"""Print results of `moerge search`."""

from __future__ import annotations

from pathlib import Path

from moerge.cli.console import Table, print_json, say, show_table, view
from moerge.searching.result import SearchResult, shown
from moerge.searching.sweep import Sweep


def search(found: SearchResult, out: Path, *, quiet: bool, as_json: bool) -> None:
    """Print the winner, and how it does on text that was not searched on."""
    if as_json:
        print_json(found.to_json())
        return
    say(f"{out / 'best.yaml'}: {found.headline()}")
    if quiet:
        return
    parameters = Table("parameter", "value", "importance")
    for name, value in found.winner.point.items():
        share = found.importance.get(name)
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        parameters.add_row(name, shown, "" if share is None else f"{100 * share:.0f}%")
    show_table(parameters)
    if found.judged:
        judged = Table("on other text", "metric", "text", "value", "difference (95%)")
        for row in found.judged:
            between = "" if row.low is None else f" ({row.low:+.4f} to {row.high:+.4f})"
            difference = "" if row.difference is None else f"{row.difference:+.4f}{between}"
            judged.add_row(row.name, row.metric, row.domain, f"{row.value:.4f}", difference)
        show_table(judged)


@view
def sweep(found: Sweep) -> None:
    """Print figures side by side, and what each merge writes."""
    domains = list(found.merges[0].bits_per_byte)
    if domains:
        table = Table("merge", *(f"{name} (bits per byte)" for name in domains))
        for merge in found.merges:
            table.add_row(shown(merge.point), *(f"{merge.bits_per_byte[name]:.4f}" for name in domains))
        show_table(table)
    for prompt in found.merges[0].continuations:
        say((prompt, "bold"))
        for merge in found.merges:
            say((f"{shown(merge.point)}: ", "cyan"), merge.continuations[prompt], soft_wrap=True)
