"""`moerge report` from a folder to a page; start reading at `report`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.extras import require
from moerge.files import atomic_path
from moerge.formatting import Displayed
from moerge.reporting.card import CardUpdate, updates
from moerge.reporting.collect import collect
from moerge.reporting.data import Collected
from moerge.reporting.find import plain

FORMAT = 1
NAME = "report.html"
_MARK = b'<meta name="generator" content="moerge '


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """The content of a folder, under a title."""

    folder: Path
    title: str
    found: Collected

    def card_updates(self) -> tuple[CardUpdate, ...]:
        """New model cards, for `write_card`, of the checkpoints with measurements. Raises InputError if there are none."""
        return updates(self.folder, self.found)

    def to_json(self) -> dict[str, Any]:
        """Return the data that the page shows and embeds."""
        return {
            "format": FORMAT,
            "moerge": version("moerge"),
            "title": self.title,
            **self.found.model_dump(mode="json", by_alias=True),
        }

    def to_html(self) -> str:
        """The page. Raises InputError where jinja2 is not installed (the extra `report`)."""
        require("report", "a report")
        from moerge.reporting.render import render
        from moerge.reporting.sections.all import sections

        return render(self.title, sections(self.found), self.to_json())


def write_report(report: Report, path: Path) -> None:
    """Write the page, whole or not at all. Raises InputError where another file is in the way, or nothing can be written."""
    page = report.to_html().encode()
    try:
        if path.exists() and _MARK not in path.read_bytes()[:5000]:
            raise InputError(f"{path} exists and is no report of moerge: choose another file with --out", code="target-exists")
        with atomic_path(path) as beside:
            beside.write_bytes(page)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from None


def report(folder: str | Path, *, title: str | None = None) -> Report:
    """Report on `folder` and below: checkpoints with their manifests, and what `compare`, `route`, `learn`, `eval` and `demo`
    wrote. Raises InputError if that is nothing.
    """
    found = collect(Path(folder))
    return Report(Path(folder), plain(title) if title else found.folder, found)
