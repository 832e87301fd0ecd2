"""The runs, their times, what is missing, and how this page was made."""

from __future__ import annotations

from moerge.formatting import plural
from moerge.reporting.blocks import Block, Column, Listing, Section, Table, Text, words
from moerge.reporting.data import Collected

_COMMANDS = {
    "evaluations": "Benchmarks and held-out text, with standard errors: `moerge eval CHECKPOINT... --out DIR/NAME`.",
    "comparisons": "How alike the experts are, and what can be merged: `moerge compare RECIPE --out DIR/NAME`.",
    "checkpoints": "A merged checkpoint: `moerge merge RECIPE DIR/NAME`.",
    "routes": "Where texts go: `moerge route CHECKPOINT --text NAME=FILE --out DIR/NAME`.",
    "learnings": "Learned coefficients and curves: `moerge learn RECIPE DIR/NAME`.",
}


def runs(found: Collected) -> Section:
    """The files that were used, with the time they were last written."""
    columns = [Column("file"), Column("written by"), Column("last written, UTC"), Column("with")]
    rows = []
    for command, file in sorted(found.files, key=lambda entry: (entry[1].written, entry[1].path)):
        versions = getattr(file, "versions", None) or {}
        made = ", ".join(f"{name} {number}" for name, number in versions.items())
        rows.append([words(file.path), words(f"`{command}`"), words(file.written), words(made or "–")])
    note = "Manifests hold no dates, so that the same recipe gives the same bytes: the times are the files' own."
    blocks: list[Block] = [Table("Files on this page", columns, rows, note)]
    if found.warnings:
        blocks += [Text("What is wrong with the files:", "warning"), Listing(found.warnings)]
    missing = [text for kind, text in _COMMANDS.items() if not getattr(found, kind)]
    if missing:
        blocks += [Text("Not on this page yet, and what makes it:"), Listing(missing)]
    left = [f"{plural(len(found.warnings), 'file')} left out, or out of date: see the end."] if found.warnings else []
    return Section("runs", "What was run when", blocks, left)
