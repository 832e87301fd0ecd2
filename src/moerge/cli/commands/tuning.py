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
    from moerge.cli import show_tuning
    from moerge.cli.progress import Progress
    from moerge.errors import InputError
    from moerge.progress import Watch
    from moerge.tuning.launch import rank
    from moerge.tuning.run import look
    from moerge.tuning.run import tune as run_tune
    from moerge.tuning.work import Work

    if dry_run:
        found = look(settings, seed=seed)
        if rank() == 0:
            show_tuning.outlook(found, as_json=json)
        return
    if out is None:
        raise InputError("say where to write: moerge tune TUNE OUT, or --dry-run")
    quiet = quiet or rank() > 0
    with Progress("tuning", quiet=quiet, unit="tokens") as progress:
        note, warn = (show_tuning.note if heard else _nothing for heard in (not quiet, rank() == 0))
        watch = Watch(progress.start, note, warn)
        with resumable(lambda: Work(out).interrupted):
            result = run_tune(settings, out, resume=resume, force=force, seed=seed, watch=watch)
    if result is not None:
        show_tuning.tuned(result, quiet=quiet, as_json=json)


def _nothing(text: str) -> None:
    """Nobody is told."""


COMMANDS = (tune,)
