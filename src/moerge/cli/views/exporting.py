"""Print the result of `moerge export`."""

from __future__ import annotations

from moerge.cli.console import say, view
from moerge.exporting import Exported


@view
def exported(found: Exported) -> None:
    """Print the file and what wrote it."""
    say(f"{found.headline()}, written by {found.converter}", soft_wrap=True)
