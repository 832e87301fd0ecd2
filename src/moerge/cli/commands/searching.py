"""Searching."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.options import AsJson, Quiet, RecipeFile, Seed


def search(
    search: Annotated[Path, typer.Argument(metavar="SEARCH", help="A SEARCH.yaml.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder for best.yaml and the report.", show_default=False)],
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Trials, instead of the file's.", show_default=False)
    ] = None,
    hours: Annotated[float | None, typer.Option("--hours", min=0, help="The longest time.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search in OUT.")] = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Search the parameters of a recipe whose merge does best, without writing merges."""
    from moerge.cli.views import searching as views
    from moerge.progress import TerminalProgress
    from moerge.searching.run import search as run_search

    with TerminalProgress(quiet=quiet) as progress:
        result = run_search(search, out, trials=trials, hours=hours, seed=seed, resume=resume, progress=progress)
    views.search(result, out, quiet=quiet, as_json=json)


def try_merges(
    recipe: RecipeFile,
    sweep: Annotated[
        list[str],
        typer.Option("--sweep", metavar="PATH=VALUES", help="Values of a key: merge.scale=0.2:1:5, or merge.method=ties,dare."),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A text to continue.", show_default=False)] = None,
    perplexity: Annotated[
        list[str] | None,
        typer.Option("--perplexity", metavar="DOMAIN=FILE", help="Text to measure in bits per byte.", show_default=False),
    ] = None,
    documents: Annotated[int, typer.Option("--documents", min=1, help="Documents of each text.")] = 16,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", help="For temperatures above 0.")] = 0,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Show what several merges of a recipe write and how well they predict text, without writing any."""
    from moerge.cli.views import searching as views
    from moerge.evaluation.texts import parse_texts
    from moerge.progress import TerminalProgress
    from moerge.searching import sweep as sweeping

    with TerminalProgress(quiet=quiet) as progress:
        result = sweeping.try_merges(
            recipe,
            sweep=dict(map(sweeping.parse_sweep, sweep)),
            prompts=prompt or (),
            texts=parse_texts(perplexity or ()),
            documents=documents,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
    views.sweep(result, quiet=quiet, as_json=json)


try_merges.__name__ = "try"
COMMANDS = (search, try_merges)
