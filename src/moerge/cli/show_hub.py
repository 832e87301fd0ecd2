"""What went to the Hub."""

from __future__ import annotations

from moerge.cli.console import Table, print_json, print_warnings, say, show_table
from moerge.formatting import as_size
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
    if found.commit is None:
        table = Table("file", "size")
        for name, size in upload.files.items():
            table.add_row(name, as_size(size))
        show_table(table)
        what = f"{len(upload.files)} files, {as_size(upload.nbytes)}"
        say(f"{what} would go to {upload.repo} ({upload.revision}); nothing was sent")
        return
    removed = f", {', '.join(found.removed)} removed" if found.removed else ""
    say(
        f"{found.url}: {len(upload.files)} files, {as_size(upload.nbytes)}{removed}, commit {found.commit}",
        soft_wrap=True,
    )
