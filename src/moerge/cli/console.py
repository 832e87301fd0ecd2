"""The layout of results: sizes, numbers and tables for people, JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

from rich import console as rich_console
from rich import table as rich_table
from rich.text import Text

from moerge.errors import InputError, one_line, printable

_TOO_LARGE = 2.0**63
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes from text such as "500MB" or "5 GiB"; InputError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or not 0 < float(match[1]) < _TOO_LARGE:
        raise InputError(f"{text!r} is not a size: write a number and a unit, such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def print_json(value: Mapping[str, Any]) -> None:
    """Print JSON on standard output."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def as_percent(share: float | None) -> str:
    """A fraction as a percentage."""
    return "" if share is None else f"{100 * share:.0f}%"


class Table(rich_table.Table):
    """A table whose headings and cells are shown as they are, whatever file they come from."""

    def __init__(self, *columns: str) -> None:
        super().__init__(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            right = column in ("size", "tensors", "output", "parameters")
            self.add_column(Text(printable(column)), justify="right" if right else "left")

    def add_row(self, *cells: Any, **options: Any) -> None:
        """Add a row of text."""
        super().add_row(*(Text(printable(cell)) for cell in cells), **options)


def say(*parts: str | tuple[str, str], stderr: bool = False, soft_wrap: bool = False) -> None:
    """Print text as it is, whatever file it comes from; a part may be a pair of text and style."""
    pieces = [(part, "") if isinstance(part, str) else part for part in parts]
    text = Text.assemble(*((printable(piece), style) for piece, style in pieces))
    rich_console.Console(stderr=stderr).print(text, highlight=False, soft_wrap=soft_wrap)


def show_table(table: Table) -> None:
    """Print a table."""
    rich_console.Console().print(table)


def print_warnings(warnings: Sequence[str]) -> None:
    """Warnings on standard error, each of them once."""
    for warning in dict.fromkeys(warnings):
        print(f"warning: {one_line(warning)}", file=sys.stderr)


def view(show: Callable[..., None]) -> Callable[..., None]:
    """Make a view of a function that prints a result: JSON, or warnings and, unless quiet, what the function prints."""

    @wraps(show)
    def shown(result: Any, *details: Any, quiet: bool = False, as_json: bool = False) -> None:
        if as_json:
            print_json(result.to_json())
            return
        print_warnings(getattr(result, "warnings", ()))
        if not quiet:
            show(result, *details)

    return shown
