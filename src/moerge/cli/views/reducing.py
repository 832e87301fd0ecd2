"""Print results of `moerge reduce`."""

from __future__ import annotations

from moerge.cli.console import Table, print_json, say, show_table
from moerge.cli.views import merging
from moerge.reduction.run import ReduceResult

_MOST_ROWS = 64


def reduced(result: ReduceResult, *, quiet: bool, as_json: bool) -> None:
    """Print what is left in each layer, and what was written."""
    if as_json:
        print_json(result.to_json())
        return
    if not quiet:
        for note in result.merged.plan.notes:
            say(note)
        table = Table("layer", "kept", "gone", "gates that went there", "router, nats")
        for layer in result.choice.layers[:_MOST_ROWS]:
            fit = result.routers.get(layer.layer)
            shown = f"{fit[0]:.3g} -> {fit[1]:.3g}" if fit else ""
            groups = (layer.members(expert) for expert in layer.kept)
            kept = ", ".join(str(own[0]) + "".join(f"+{other}" for other in own[1:]) for own in groups)
            table.add_row(str(layer.layer), kept, ", ".join(map(str, layer.gone)), f"{layer.gate_share:.1%}", shown)
        show_table(table)
        ran = f"ran the text of {', '.join(result.gathered)}" if result.gathered else "ran no text"
        say(f"statistics in {result.statistics}: {ran}")
    merging.merge(result.merged, quiet=quiet, as_json=False)
