"""What a report holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from moerge.cli.console import print_json, print_warnings
from moerge.report import Report


def reported(made: Report, path: Path, *, quiet: bool, as_json: bool) -> None:
    """Print where the page is, and how many files of each kind went into it."""
    if as_json:
        print_json({"report": str(path), **made.to_json()})
        return
    print_warnings(made.found.warnings)
    if quiet:
        return
    counted = Counter(command for command, _ in made.found.files)
    kinds = ", ".join(f"{number} of {command}" for command, number in counted.items())
    Console().print(f"{escape(str(path))}: results {escape(kinds)}", highlight=False, soft_wrap=True)
