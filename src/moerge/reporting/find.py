"""The files of moerge's commands in a folder, known by their content. Nothing that a file names is opened."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moerge.checkpoint.staging import MANIFEST
from moerge.errors import InputError
from moerge.files import read_file

DEEPEST, MOST_FOLDERS = 5, 5000
"""Folders below the one that was named, and how many of them are looked into."""
MOST_BYTES = 64_000_000
"""Larger files are no results of ours; a manifest has 100 bytes for each tensor."""
_NAMES = (
    MANIFEST,
    "compare.json",
    "comparison.json",
    "route.json",
    "results.json",
    "coefficients.json",
    "learning.csv",
    "metrics.jsonl",
    "tune.json",
)


@dataclass(frozen=True)
class Source:
    """A file: its path below the folder that was named, and what it holds. `written` is when, in UTC, to the minute."""

    path: str
    folder: Path
    data: Any
    written: str


def sources(top: Path, warnings: list[str]) -> Iterator[Source]:
    """The files with names that commands give to results, folder by folder; what cannot be read becomes a warning.

    Links are not followed, hidden folders not entered. Raises InputError where `top` is no folder, or one with too much below it.
    """
    if not top.is_dir():
        raise InputError(
            f"{top} is not a folder: name one with a checkpoint, or with what `moerge eval`, `compare` or `route` wrote"
        )
    for number, (folder, below, files) in enumerate(os.walk(top, onerror=lambda error: warnings.append(_reason(top, error)))):
        if number >= MOST_FOLDERS:
            raise InputError(f"there are more than {MOST_FOLDERS:,} folders below {top}: name a smaller one")
        deep = len(Path(folder).relative_to(top).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if deep < DEEPEST else []
        for name in sorted({*_NAMES} & set(files)):
            path = Path(folder) / name
            try:
                yield _read(path, top)
            except InputError as error:
                warnings.append(str(error))


def _reason(top: Path, error: OSError) -> str:
    return f"{error.filename or top} cannot be read: {error.strerror}"


def _read(path: Path, top: Path) -> Source:
    shown = path.relative_to(top).as_posix()
    if plain(shown) != shown:
        raise InputError(f"{plain(shown)} was left out for the odd characters in its path: rename it")
    if path.is_symlink() or not path.is_file():
        raise InputError(f"{shown} is a link or no file, and was left out: put the file itself there")
    try:
        about = path.stat()
        if about.st_size > MOST_BYTES:
            raise InputError(f"{shown} has {about.st_size:,} bytes, more than any result has: it was left out")
        data = plain(_parse(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{shown} is damaged and was left out: {_line(error)}", code="damaged-file") from None
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from None
    written = datetime.fromtimestamp(about.st_mtime, UTC).strftime("%Y-%m-%d %H:%M")
    return Source(shown, path.parent, data, written)


def _parse(path: Path) -> Any:
    text = read_file(path).decode("utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def plain(value: Any) -> Any:
    """Return the value with only characters that a page can show: no control characters, no half surrogates, no change of
    direction.
    """
    if isinstance(value, str):
        return "".join(character if _shown(character) else "\N{REPLACEMENT CHARACTER}" for character in value)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


def _shown(character: str) -> bool:
    code = ord(character)
    control = (code < 32 and character not in "\n\t") or 127 <= code < 160
    return not (control or 0xD800 <= code < 0xE000 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069)


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
