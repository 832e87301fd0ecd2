"""Progress of long work: one protocol for all verbs, and the display on standard error.

Work takes a `Progress` and starts a phase with a name, a total and a unit; it gets back a callback for the amounts that are
done, which may be called from any thread. The base class ignores everything, so that `SILENT` is the default of all work.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

from moerge.errors import printable
from moerge.formatting import as_size

Unit = Literal["bytes", "texts", "tokens", "steps"]
Advance = Callable[[int], None]
"""Receives the amount done since the last call."""

_PATIENCE_SECONDS = 2.0
_LOG_EVERY_SECONDS = 15.0
_LEAST_SHARE = 0.01
"""Done before the time left is estimated: at first files are opened and kernels compiled."""


class Progress:
    """Receives what long work does. A context manager that ends the phase at hand. This base class ignores everything."""

    def phase(self, name: str, total: int, unit: Unit = "bytes") -> Advance:
        """Start a phase of `total` units, which ends the one before; returns the callback for the amounts done."""
        return _ignore

    def finish(self) -> None:
        """End the phase at hand."""

    def info(self, text: str) -> None:
        """Receive a fact."""

    def warning(self, text: str) -> None:
        """Receive what the user should know."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()


def _ignore(amount: int) -> None:
    """Do nothing."""


SILENT = Progress()


def reporter(progress: Progress | bool) -> Progress:
    """Turn the argument `progress` of a verb into a `Progress`: True shows a display on standard error, False nothing."""
    if isinstance(progress, Progress):
        return progress
    return TerminalProgress() if progress else SILENT


class TerminalProgress(Progress):
    """A bar on a terminal, a line now and then elsewhere, on standard error; only once a phase has taken two seconds.

    `quiet` hides phases and facts, but no warning. `muted` hides warnings too.
    """

    def __init__(self, *, quiet: bool = False, muted: bool = False) -> None:
        self._quiet, self._muted = quiet, muted
        self._display: _Display | None = None

    def phase(self, name: str, total: int, unit: Unit = "bytes") -> Advance:
        """Count towards `total`, and show it."""
        self.finish()
        if self._quiet:
            return _ignore
        self._display = _Display(name, total, unit)
        return self._display.advance

    def finish(self) -> None:
        """Show nothing more of the phase at hand."""
        if self._display is not None:
            self._display.end()
            self._display = None

    def info(self, text: str) -> None:
        """Print a fact unless quiet."""
        if not self._quiet:
            print(printable(text), file=sys.stderr)

    def warning(self, text: str) -> None:
        """Print a warning unless muted."""
        if not self._muted:
            print(printable(text), file=sys.stderr)


class _Display:
    """One phase on standard error: amount, rate, time left."""

    def __init__(self, name: str, total: int, unit: Unit) -> None:
        self._name, self._total, self._unit = name, total, unit
        self._done = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._painter = threading.Thread(target=self._paint, daemon=True)
        self._painter.start()

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount

    def end(self) -> None:
        self._ended.set()
        self._painter.join()

    def _paint(self) -> None:
        if self._ended.wait(_PATIENCE_SECONDS):
            return
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            self._draw_bar(console)
        else:
            self._log_lines(console)

    def _draw_bar(self, console: Any) -> None:
        from rich import progress as rich_progress

        amount = (
            (rich_progress.DownloadColumn(), rich_progress.TransferSpeedColumn())
            if self._unit == "bytes"
            else (rich_progress.MofNCompleteColumn(),)
        )
        columns = (
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            *amount,
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(self._name, total=self._total)
            while not self._ended.wait(0.1):
                flushing = self._done >= self._total and self._unit == "bytes"
                bar.update(task, completed=self._done, description="flushing to disk" if flushing else self._name)

    def _log_lines(self, console: Any) -> None:
        begun = time.monotonic() - _PATIENCE_SECONDS
        while True:
            rate = self._done / (time.monotonic() - begun)
            enough = self._done >= _LEAST_SHARE * self._total
            left = f"{(self._total - self._done) / rate:.0f} s left" if rate and enough else "time left unknown"
            amounts = (
                f"{as_size(self._done)} of {as_size(self._total)}, {as_size(rate)}/s"
                if self._unit == "bytes"
                else f"{self._done:,} of {self._total:,} {self._unit}, {rate:,.{0 if rate >= 10 else 2}f}/s"
            )
            console.print(f"{self._name}: {amounts}, {left}", highlight=False, markup=False)
            if self._ended.wait(_LOG_EVERY_SECONDS):
                return
