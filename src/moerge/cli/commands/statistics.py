"""Statistics of models over text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moerge.cli.options import AsJson, Device, Quiet, RecipeFile


def stats(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write EXPERT.safetensors into.", show_default=False)],
    kind: Annotated[
        Literal["fisher", "regmean", "all"] | None,
        typer.Option("--kind", help="What to gather; default: what the recipe's methods use.", show_default=False),
    ] = None,
    expert: Annotated[
        list[str], typer.Option("--expert", metavar="NAME", help="Whom of; default: all.", show_default=False)
    ] = [],  # noqa: B006
    part: Annotated[str, typer.Option("--part", metavar="I/N", help="Every N-th text only, from number I on.")] = "1/1",
    add: Annotated[
        list[Path],
        typer.Option("--add", metavar="FOLDER", help="Gather nothing: add up what lies in such folders.", show_default=False),
    ] = [],  # noqa: B006
    texts: Annotated[int, typer.Option("--texts", min=1, help="Most texts of each expert.")] = 1000,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Most tokens of each text.")] = 512,
    labels: Annotated[
        Literal["text", "sampled"], typer.Option("--labels", help="Fisher: the text's next tokens, or drawn from the model.")
    ] = "text",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the tokens that are drawn.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="RegMean: texts that run together.")] = 1,
    passes: Annotated[
        int | None,
        typer.Option("--passes", min=1, help="Runs over the text; default: as few as fit into memory.", show_default=False),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option("--dtype", help="Run in this type; default: as stored, float32 for float16.", show_default=False),
    ] = None,
    device: Device = None,
    force: Annotated[bool, typer.Option("--force", help="Replace statistics that are there already.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Run each expert over its own text and write what 'method: fisher' and 'method: regmean' need."""
    from moerge.cli.views import statistics as views
    from moerge.gather.gather import Options, add_folders, gather, parse_part
    from moerge.progress import TerminalProgress
    from moerge.recipe import load_recipe

    loaded = load_recipe(recipe)
    chosen: dict[str, Any] = {"kind": kind, "experts": tuple(expert), "part": parse_part(part), "texts": texts, "tokens": tokens}
    chosen |= {"labels": labels, "seed": seed, "batch_size": batch_size, "passes": passes, "dtype": dtype, "device": device}
    options = Options(**chosen, force=force)
    progress = TerminalProgress(quiet=quiet)
    outcomes = add_folders(loaded, out, add, options) if add else gather(loaded, out, options, progress)
    views.outcomes(outcomes, out, quiet=quiet, as_json=json)


COMMANDS = (stats,)
