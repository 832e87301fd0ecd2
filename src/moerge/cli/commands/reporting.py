"""Reports."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.options import AsJson, Quiet


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder with checkpoints, results or both.", show_default=False)
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.html", help="Default: DIR/report.html.", show_default=False)
    ] = None,
    title: Annotated[
        str | None, typer.Option("--title", help="Of the page; default: the folder's name.", show_default=False)
    ] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Also write what was measured into the checkpoints' model cards.")
    ] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Put what was merged, compared, routed, learned and measured on one HTML page that needs no network."""
    from moerge.cli.views import reporting as views
    from moerge.reporting import report as make_report
    from moerge.reporting.flow import NAME

    made = make_report(folder, title=title)
    cards = made.card_updates() if update_card else ()
    path = out or folder / NAME
    made.write(path)
    for card in cards:
        card.write()
    views.reported(made, path, cards, quiet=quiet, as_json=json)


COMMANDS = (report,)
