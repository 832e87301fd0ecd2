"""Planning, merging, looking at checkpoints, and renewing their code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moerge.cli.interruption import resumable
from moerge.cli.options import AsJson, CheckpointName, For, Quiet, RecipeFile, Seed, Threads

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moerge.recipe import Recipe


def plan(
    recipe: RecipeFile,
    clients: For = [],  # noqa: B006
    seed: Seed = None,
    threads: Threads = None,
    json: AsJson = False,
    as_recipe: Annotated[bool, typer.Option("--as-recipe", help="Print a mergekit file as a recipe of moerge's own.")] = False,
) -> None:
    """Print what a recipe amounts to; no tensor is read."""
    from moerge.cli.views import merging as views
    from moerge.merging.pipeline import plan as make_plan
    from moerge.tensors.threads import default_threads

    planned = make_plan(recipe, seed=seed, clients=clients)
    if as_recipe:
        views.recipe(planned)
        return
    views.plan(planned, threads or default_threads(), as_json=json)


def merge(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    clients: For = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted merge into OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that moerge made in OUT.")] = False,
    seed: Seed = None,
    threads: Threads = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest shard, such as 500MB or 5GB.")] = "5GB",
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Go on where inputs hold NaN or infinity.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Merge as the recipe says and write the checkpoint folder OUT."""
    from moerge.checkpoint.staging import staging_folder
    from moerge.cli.console import parse_size
    from moerge.cli.views import merging as views
    from moerge.merging.pipeline import merge as run_merge
    from moerge.progress import TerminalProgress
    from moerge.recipe import load_recipe

    options: dict[str, Any] = {
        "resume": resume,
        "force": force,
        "threads": threads,
        "max_shard_bytes": parse_size(max_shard_size),
        "allow_nonfinite": allow_nonfinite,
        "clients": clients,
    }
    loaded = load_recipe(recipe, seed=seed)
    if loaded.output is not None:
        _merge_adapters(loaded, out, {"--resume": resume, "--force": force, "--for": clients}, threads, quiet, json)
        return
    with TerminalProgress(quiet=quiet) as progress, resumable(lambda: staging_folder(out).exists()):
        result = run_merge(loaded, out, progress=progress, **options)
    views.merge(result, quiet=quiet, as_json=json)


def _merge_adapters(
    recipe: Recipe, out: Path, refused: Mapping[str, Any], threads: int | None, quiet: bool, as_json: bool
) -> None:
    """Merge into an adapter. InputError for an option that is for models."""
    from moerge.cli.views import adapters as views
    from moerge.errors import InputError
    from moerge.extraction.adapters import merge_adapters
    from moerge.progress import TerminalProgress

    option = next((option for option, value in refused.items() if value), None)
    if option:
        raise InputError(f"{option} is for models, and the output of {recipe.source} is an adapter: leave it out")
    with TerminalProgress(quiet=quiet) as progress:
        found = merge_adapters(recipe, out, threads=threads, progress=progress)
    views.extraction(found, quiet=quiet, as_json=as_json)


def verify(checkpoint: CheckpointName, threads: Threads = None, quiet: Quiet = False, json: AsJson = False) -> None:
    """Check that every tensor is present, finite, of the right shape, and what the manifest says."""
    from moerge.cli.views import merging as views
    from moerge.inspection import verify as run_verify
    from moerge.progress import TerminalProgress

    with TerminalProgress(quiet=quiet) as progress:
        found = run_verify(checkpoint, threads=threads, progress=progress)
    views.verification(found, quiet=quiet, as_json=json)
    if found.problems:
        raise typer.Exit(2)


def inspect(checkpoint: CheckpointName, json: AsJson = False) -> None:
    """Show a checkpoint's family, sizes, roles, tokenizer, and how it was made."""
    from moerge.cli.views import merging as views
    from moerge.inspection import inspect as run_inspect

    views.inspection(run_inspect(checkpoint), as_json=json)


def refresh(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.", show_default=False)],
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Replace the code that a sequence-routed checkpoint carries by this moerge's, for a newer transformers."""
    from moerge.cli.views import merging as views
    from moerge.renewal import refresh as run_refresh

    views.refreshed(run_refresh(checkpoint), quiet=quiet, as_json=json)


COMMANDS = (plan, merge, verify, inspect, refresh)
