"""Print results of `moerge extract`, and what adapters are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moerge.cli.console import Table, say, show_table, view
from moerge.formatting import as_count, as_size, as_time

if TYPE_CHECKING:
    from moerge.extraction import Extraction


@view
def extraction(found: Extraction) -> None:
    """Print what an extraction kept."""
    table = Table("role", "stored as", "tensors", "rank", "of the task vector", "kept")
    for role in found.roles:
        low, high = role.ranks or ("", "")
        ranks = str(low) if low == high else f"{low} to {high}"
        table.add_row(role.role, role.kind, str(role.tensors), ranks, f"{found.part(role):.2%}", f"{role.share:.2%}")
    show_table(table)
    say(
        f"{found.folder}: {as_count(found.parameters)} parameters, {as_size(found.nbytes)}, keeps {found.share:.2%} "
        f"of the task vector's squared norm ({found.share_of_modules:.2%} of what became low-rank), in {as_time(found.seconds)}",
    )


def adapter_rows(table: Table, adapter: Mapping[str, Any]) -> None:
    """Add an adapter's settings as rows to a table of facts."""
    ranks, alpha = ", ".join(map(str, adapter["ranks"])), adapter["alpha"]
    facts = [adapter["type"], *adapter["variants"], *([f"rank {ranks}"] if ranks else []), *([f"alpha {alpha}"] if alpha else [])]
    table.add_row("adapter", ", ".join(facts))
    table.add_row("of the base", str(adapter["base"] or "not said"))
    table.add_row("modules", ", ".join(adapter["modules"]))
    if adapter["modules_to_save"]:
        table.add_row("stored whole", ", ".join(adapter["modules_to_save"]))
    if adapter["problem"]:
        table.add_row("not usable", adapter["problem"])
