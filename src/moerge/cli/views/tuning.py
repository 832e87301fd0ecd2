"""Print plans and results of `moerge tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moerge.cli.console import Table, print_json, say, show_table, view
from moerge.cli.views.learning import note
from moerge.formatting import as_count, as_size, as_time

if TYPE_CHECKING:
    from moerge.tuning.tune_plan import TunePlan
    from moerge.tuning.tune_result import TuneResult

__all__ = ["note", "show_plan", "tuned"]


def show_plan(plan: TunePlan, *, as_json: bool) -> None:
    """Print the sources with their shares of tokens, what is trained, and sizes."""
    figures = plan.to_json()
    if as_json:
        print_json(figures)
        return
    table = Table("source", "expected", "drawn", "tokens", "lasts")
    for name, source in figures["sources"].items():
        enough = "longer than this run" if source["read"] is None else f"read {source['read']:.2f} times"
        shares = (f"{100 * source['expected_share']:.2f}%", f"{100 * source['drawn_share']:.2f}%")
        table.add_row(name, *shares, f"{source['tokens']:,}", enough)
    show_table(table)
    trained, whole = figures["trained_parameters"], figures["parameters"]["all"]
    targets = f", teachers' targets {as_size(figures['target_bytes'])}" if figures["target_bytes"] else ""
    say(
        f"{figures['steps']:,} steps, {figures['tokens']:,} tokens; trains {as_count(trained)} of {as_count(whole)} parameters\n"
        f"on disk meanwhile: {as_size(figures['disk_bytes'])} for training checkpoints of "
        f"{as_size(figures['checkpoint_bytes'])} and the result{targets}",
    )
    for warning in figures["warnings"]:
        note(warning)


@view
def tuned(result: TuneResult) -> None:
    """Print the result's folder and the figures of the last step."""
    facts, last = result.facts, result.facts["last"]
    if result.was_complete:
        say(f"{result.folder} is complete already, of the same settings and models: nothing was done")
        return
    say(
        f"{result.folder}: {facts['steps']:,} steps, {facts['tokens']:,} tokens in {as_time(facts['seconds'])}, "
        f"cross-entropy {last['cross_entropy']:.4f} in the last step",
        soft_wrap=True,
    )
