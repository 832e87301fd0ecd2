"""Learning to merge."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moerge.cli.options import AsJson, Quiet, RecipeFile, Seed

if TYPE_CHECKING:
    from moerge.planning.plan import Plan


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
    from moerge.cli import show_learning
    from moerge.cli.progress import Progress
    from moerge.learning.run import learn as run_learn
    from moerge.progress import Watch
    from moerge.recipe import load_recipe

    with Progress("learning", quiet=quiet, unit="texts") as learning, Progress("merging", quiet=quiet) as merging:
        watch = Watch(learning.start, show_learning.note if not quiet else lambda text: None)

        def begin(plan: Plan) -> Callable[[int], None]:
            learning.finish()
            return merging.start(plan.work_bytes)

        result = run_learn(load_recipe(recipe, seed=seed), out, force=force, watch=watch, progress=begin)
    show_learning.learned(result, quiet=quiet, as_json=json)


COMMANDS = (learn,)
