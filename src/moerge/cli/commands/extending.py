"""Mixtures that grow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moerge.cli.interruption import resumable
from moerge.cli.options import AsJson, Quiet, Threads


def extend(
    moe: Annotated[str, typer.Argument(metavar="MOE", help="A native mixture, a folder or Hub id.", show_default=False)],
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="The arriving dense model.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    decide: Annotated[
        Literal["add", "affinity"], typer.Option("--decide", help="Always add, or merge into the nearest expert if it is near.")
    ] = "add",
    base: Annotated[str | None, typer.Option("--base", help="The common ancestor, for affinity.", show_default=False)] = None,
    text: Annotated[Path | None, typer.Option("--text", help="The arriving model's text.", show_default=False)] = None,
    name: Annotated[str | None, typer.Option("--name", help="The new expert's name.", show_default=False)] = None,
    beta: Annotated[float, typer.Option("--beta", help="Deviations of the threshold above the mean.")] = 1.0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run into OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that moerge made in OUT.")] = False,
    threads: Threads = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Write a native mixture with one more expert, or with the arriving model merged into the nearest one."""
    from moerge.checkpoint.staging import staging_folder
    from moerge.cli.views import extending as views
    from moerge.extension import extend as run_extend
    from moerge.progress import TerminalProgress

    given = {"decide": decide, "base": base, "text": text, "name": name, "beta": beta}
    options = {"resume": resume, "force": force, "threads": threads}
    with TerminalProgress(quiet=quiet) as progress, resumable(lambda: staging_folder(out).exists()):
        result = run_extend(moe, expert, out, progress=progress, **given, **options)  # type: ignore[arg-type]
    views.extended(result, quiet=quiet, as_json=json)


COMMANDS = (extend,)
