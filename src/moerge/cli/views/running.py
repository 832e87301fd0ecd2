"""Print generated text and routes."""

from __future__ import annotations

from moerge.cli.console import Table, as_percent, print_json, say, show_table, view
from moerge.errors import printable
from moerge.inference.generation import Generation
from moerge.inference.result import Routes


def generation(found: Generation, *, as_json: bool) -> None:
    """Print what a model wrote, and nothing else."""
    if as_json:
        print_json(found.to_json())
    else:
        for note in found.notes:
            say(note, stderr=True)
        print(printable(found.text))


@view
def routes(found: Routes) -> None:
    """Print how texts are routed: for each expert its mean weight, and in brackets how often it is first."""
    judged = ["oracle"] if found.oracle_accuracy is not None else []
    table = Table("text", "docs", *found.experts, "entropy", "accuracy", *judged)
    table.collapse_padding = True  # room for the names of a few experts on a narrow terminal
    for column in table.columns[1:]:
        column.justify = "right"
    for name, text in found.texts.items():
        shares = [f"{100 * text.alpha[expert]:.0f} ({100 * text.first[expert]:.0f})" for expert in found.experts]
        oracle = [as_percent(text.oracle_accuracy)] if judged else []
        table.add_row(name, str(text.documents), *shares, f"{text.entropy:.2f}", as_percent(text.accuracy), *oracle)
    oracle = [as_percent(found.oracle_accuracy)] if judged else []
    table.add_row(
        "mean", "", *(f"{100 * found.load[expert]:.0f}" for expert in found.experts), "", as_percent(found.accuracy), *oracle
    )
    show_table(table)
    say(_legend(found))


def _legend(found: Routes) -> str:
    per = "sequences" if found.level == "sequence" else "tokens and layers"
    oracle = "; oracle: it is the one with the lowest loss on the document" if found.oracle_accuracy is not None else ""
    return (
        f"mean weight in %, in brackets the share of {per} for which an expert is first; "
        f"accuracy: the first expert is the text's own{oracle}; "
        f"load balance {found.balance:.2f} (1: even, {len(found.experts)}: all to one)"
    )
