"""Publishing checkpoints on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.options import AsJson, Quiet


def push(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.", show_default=False)],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="The repository, owner/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[str, typer.Option("--revision", help="The branch; made where it does not exist.")] = "main",
    message: Annotated[
        str | None, typer.Option("--message", help="Of the commit; default: that moerge merged it.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Verify and list what would be uploaded; send nothing.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Verify a checkpoint and upload its own files to the Hugging Face Hub, in one commit."""
    import sys

    from moerge import hub
    from moerge.cli.views import hub as views
    from moerge.progress import TerminalProgress

    if not dry_run:  # before minutes of verifying
        hub.require_token()
    with TerminalProgress(quiet=quiet) as progress:
        upload = hub.prepare(checkpoint, repo, revision=revision, progress=progress)
    if dry_run:
        views.pushed(hub.Pushed(upload), quiet=quiet, as_json=json)
        return
    shown = not quiet and not json and sys.stderr.isatty()
    views.pushed(hub.send(upload, private=private, message=message, show_progress=shown), quiet=quiet, as_json=json)


COMMANDS = (push,)
