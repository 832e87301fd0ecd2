"""Steps done and time left on standard error: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LOG_EVERY_SECONDS = 15.0


@contextmanager
def counting(total: int) -> Iterator[Callable[[str], None]]:
    """Yields the function that is told, once for each of `total` steps, what is being done."""
    from rich.console import Console

    console = Console(stderr=True)
    with _bar(console, total) if console.is_terminal else _lines(console, total) as advance:
        yield advance


@contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<32}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda doing: bar.update(task, advance=1, description=doing)


@contextmanager
def _lines(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    begun = last = time.monotonic()
    done = 0

    def advance(doing: str) -> None:
        nonlocal done, last
        done, now = done + 1, time.monotonic()
        if now - last >= _LOG_EVERY_SECONDS:
            last = now
            left = (total - done) * (now - begun) / done
            console.print(f"{doing}: {done} of {total} steps, {left:.0f} s left", highlight=False)

    yield advance
