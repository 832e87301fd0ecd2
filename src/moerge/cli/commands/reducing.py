"""Mixtures with fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.interruption import resumable
from moerge.cli.options import AsJson, For, Quiet, RecipeFile, Threads


def reduce(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    clients: For = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted reduction into OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that moerge made in OUT.")] = False,
    threads: Threads = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest shard, such as 500MB or 5GB.")] = "5GB",
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Write a native mixture with fewer experts: prune, fold, refit the router."""
    from moerge.checkpoint.staging import staging_folder
    from moerge.cli.console import parse_size
    from moerge.cli.views import reducing as views
    from moerge.progress import TerminalProgress
    from moerge.reduction.run import reduce as run_reduce
    from moerge.reduction.settings import load_reduction

    options = {"resume": resume, "force": force, "threads": threads, "max_shard_bytes": parse_size(max_shard_size)}
    loaded = load_reduction(recipe)
    with TerminalProgress(quiet=quiet) as progress, resumable(lambda: staging_folder(out).exists()):
        result = run_reduce(loaded, out, progress=progress, clients=clients, **options)  # type: ignore[arg-type]
    views.reduced(result, quiet=quiet, as_json=json)


COMMANDS = (reduce,)
