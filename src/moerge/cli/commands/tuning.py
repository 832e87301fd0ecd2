"""Fine-tuning and distilling a merged model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.interruption import resumable
from moerge.cli.options import AsJson, Quiet


def tune(
    settings: Annotated[Path, typer.Argument(metavar="TUNE", help="The settings, a YAML file.", show_default=False)],
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the data's shares and sizes, and train nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted tuning into OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that moerge made in OUT.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Replace the seed.", show_default=False)] = None,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Fine-tune or distil a mixture of experts or a dense model into OUT, on one process or, with torchrun, several."""
    from moerge.cli.views import tuning as views
    from moerge.errors import InputError
    from moerge.progress import TerminalProgress
    from moerge.tuning.launch import rank
    from moerge.tuning.run import plan_tune
    from moerge.tuning.run import tune as run_tune
    from moerge.tuning.run_directory import RunDirectory

    if dry_run:
        plan = plan_tune(settings, seed=seed)
        if rank() == 0:
            views.show_plan(plan, as_json=json)
        return
    if out is None:
        raise InputError("say where to write: moerge tune TUNE OUT, or --dry-run")
    quiet = quiet or rank() > 0
    with TerminalProgress(quiet=quiet, muted=rank() > 0) as progress, resumable(lambda: RunDirectory(out).interrupted):
        result = run_tune(settings, out, resume=resume, force=force, seed=seed, progress=progress)
    if result is not None:
        views.tuned(result, quiet=quiet, as_json=json)


COMMANDS = (tune,)
