"""Learning to merge."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moerge.cli.options import AsJson, Quiet, RecipeFile, Seed

if TYPE_CHECKING:
    pass


def learn(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint that moerge made in OUT, and OUT.coefficients.json.")
    ] = False,
    seed: Seed = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Learn merging coefficients from unlabelled text (Expert Merging), and merge with them into OUT."""
    from moerge.cli.views import learning as views
    from moerge.learning.run import learn as run_learn
    from moerge.progress import TerminalProgress
    from moerge.recipe import load_recipe

    with TerminalProgress(quiet=quiet) as progress:
        result = run_learn(load_recipe(recipe, seed=seed), out, force=force, progress=progress)
    views.learned(result, quiet=quiet, as_json=json)


COMMANDS = (learn,)
