"""Comparing experts before they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.options import AsJson, Quiet, RecipeFile, Threads


def compare(
    recipe: RecipeFile,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write tables and figures here.", show_default=False)
    ] = None,
    density: Annotated[
        float | None,
        typer.Option("--density", help="What TIES is asked about; default: the recipe's, or 1.", show_default=False),
    ] = None,
    threads: Threads = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Show how alike a recipe's experts are, per layer and role, and which roles can be merged."""
    from moerge.cli.views import comparison as views
    from moerge.comparison import compare as run_compare
    from moerge.figures import check_folder
    from moerge.progress import TerminalProgress

    if out is not None:
        check_folder(out, "--out")
    with TerminalProgress(quiet=quiet) as progress:
        found = run_compare(recipe, density=density, threads=threads, progress=progress)
    written = found.write(out) if out is not None else ()
    views.comparison(found, written, quiet=quiet, as_json=json)


COMMANDS = (compare,)
