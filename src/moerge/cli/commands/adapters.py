"""Adapters: a task vector as a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moerge.cli.options import AsJson, Quiet, Threads

_Patterns = list[str] | None


def extract(
    expert: Annotated[str, typer.Argument(metavar="EXPERT", help="A fine-tuned model: a folder or Hub id.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The adapter's folder to write.", show_default=False)],
    base: Annotated[str, typer.Option("--base", help="The model that it was fine-tuned from.", show_default=False)],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Rank of every matrix; default: 16.", show_default=False)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option("--energy", help="Share of each matrix to keep, by the smallest rank that does.", show_default=False),
    ] = None,
    modules: Annotated[
        _Patterns,
        typer.Option(
            "--modules", metavar="PATTERN", help="What becomes low-rank; default: attention and ffn.", show_default=False
        ),
    ] = None,
    modules_to_save: Annotated[
        _Patterns, typer.Option("--modules-to-save", metavar="PATTERN", help="What is stored whole.", show_default=False)
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option("--dtype", help="Element type of the adapter.")
    ] = "float32",
    threads: Threads = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Write what an expert learned as a LoRA adapter of its base, and say how much of it is kept."""
    from moerge.cli.views import adapters as views
    from moerge.extraction import extract as run_extract
    from moerge.progress import TerminalProgress

    with TerminalProgress(quiet=quiet) as progress:
        found = run_extract(
            expert,
            out,
            base=base,
            rank=rank,
            energy=energy,
            modules=modules or (),
            modules_to_save=modules_to_save or (),
            dtype=dtype,
            threads=threads,
            progress=progress,
        )
    views.extraction(found, quiet=quiet, as_json=json)


COMMANDS = (extract,)
