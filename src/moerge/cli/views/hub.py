"""Print the result of `moerge push`."""

from __future__ import annotations

from moerge.cli.console import Table, say, show_table, view
from moerge.formatting import as_size
from moerge.hub import Pushed


@view
def pushed(found: Pushed) -> None:
    """Print where a checkpoint is now, or what would be uploaded."""
    upload = found.upload
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
