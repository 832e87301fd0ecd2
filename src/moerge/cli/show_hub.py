"""What went to the Hub."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from moerge.cli.console import as_size, new_table, print_json, print_warnings
from moerge.hub import Pushed


def pushed(found: Pushed, *, quiet: bool, as_json: bool) -> None:
    """Print where a checkpoint is now, or what would be uploaded."""
    if as_json:
        print_json(found.to_json())
        return
    upload = found.upload
    print_warnings(upload.warnings)
    if quiet:
        return
    console = Console()
    if found.commit is None:
        table = new_table("file", "size")
        for name, size in upload.files.items():
            table.add_row(escape(name), as_size(size))
        console.print(table)
        what = f"{len(upload.files)} files, {as_size(upload.nbytes)}"
        console.print(f"{what} would go to {upload.repo} ({upload.revision}); nothing was sent", highlight=False)
        return
    removed = f", {', '.join(found.removed)} removed" if found.removed else ""
    console.print(
        f"{found.url}: {len(upload.files)} files, {as_size(upload.nbytes)}{escape(removed)}, commit {found.commit}",
        highlight=False,
        soft_wrap=True,
    )
