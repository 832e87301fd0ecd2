"""Print results of `moerge report`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moerge.checkpoint.source_cards import CARD
from moerge.cli.console import print_json, print_warnings, say
from moerge.reporting import Report
from moerge.reporting.card import Update


def reported(made: Report, path: Path, cards: Sequence[Update], *, quiet: bool, as_json: bool) -> None:
    """Print where the page is, how many files of each kind went into it, and which model cards are new."""
    if as_json:
        print_json({"report": str(path), "cards": [str(card.folder / CARD) for card in cards], **made.to_json()})
        return
    print_warnings([*made.found.warnings, *(card.warning for card in cards if card.warning)])
    if quiet:
        return
    counted = Counter(command for command, _ in made.found.files)
    kinds = ", ".join(f"{number} of {command}" for command, number in counted.items())
    say(f"{path}: results {kinds}", soft_wrap=True)
    for card in cards:
        say(f"{card.folder / CARD}: what was measured is in it", soft_wrap=True)
