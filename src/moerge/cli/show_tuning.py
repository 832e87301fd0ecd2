"""What a tuning will do, and what it did."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from moerge.cli.console import as_count, as_size, as_time, new_table, print_json
from moerge.cli.show_learning import note

if TYPE_CHECKING:
    from moerge.tune.outlook import Outlook
    from moerge.tune.result import TuneResult

__all__ = ["note", "outlook", "tuned"]


def outlook(found: Outlook, *, as_json: bool) -> None:
    """Print the sources with their shares of tokens, what is trained, and sizes."""
    figures = found.to_json()
    if as_json:
        print_json(figures)
        return
    console = Console()
    table = new_table("source", "expected", "drawn", "tokens", "lasts")
    for name, source in figures["sources"].items():
        enough = "longer than this run" if source["read"] is None else f"read {source['read']:.2f} times"
        shares = (f"{100 * source['expected_share']:.2f}%", f"{100 * source['drawn_share']:.2f}%")
        table.add_row(name, *shares, f"{source['tokens']:,}", enough)
    console.print(table)
    trained, whole = figures["trained_parameters"], figures["parameters"]["all"]
    targets = f", teachers' targets {as_size(figures['target_bytes'])}" if figures["target_bytes"] else ""
    console.print(
        f"{figures['steps']:,} steps, {figures['tokens']:,} tokens; trains {as_count(trained)} of {as_count(whole)} parameters\n"
        f"on disk meanwhile: {as_size(figures['disk_bytes'])} for training checkpoints of "
        f"{as_size(figures['checkpoint_bytes'])} and the result{targets}",
        highlight=False,
    )
    for warning in figures["warnings"]:
        note(warning)


def tuned(result: TuneResult, *, quiet: bool, as_json: bool) -> None:
    """Print where the result lies and what the last step was like."""
    if as_json:
        print_json(result.to_json())
        return
    if quiet:
        return
    facts, last = result.facts, result.facts["last"]
    Console().print(
        f"{result.folder}: {facts['steps']:,} steps, {facts['tokens']:,} tokens in {as_time(facts['seconds'])}, "
        f"cross-entropy {last['cross_entropy']:.4f} in the last step",
        highlight=False,
        soft_wrap=True,
    )
