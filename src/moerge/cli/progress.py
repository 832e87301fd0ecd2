"""Progress on standard error: bytes, tokens or texts, rate, time left; only once work has taken two seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

_PATIENCE_SECONDS = 2.0
_LOG_EVERY_SECONDS = 15.0
_LEAST_SHARE = 0.01
"""Done before the time left is estimated: at first files are opened and kernels compiled."""


class Progress:
    """A context manager; `start(total)` returns the function that is told what is done, in its unit, from any thread."""

    def __init__(self, what: str, *, quiet: bool, unit: Literal["bytes", "tokens", "texts"] = "bytes") -> None:
        self._what, self._quiet, self._unit = what, quiet, unit
        self._done, self._total = 0, 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._painter: threading.Thread | None = None

    def start(self, total: int) -> Callable[[int], None]:
        """Begin to count towards `total`."""
        self._total = total
        if not self._quiet and self._painter is None:
            self._painter = threading.Thread(target=self._paint, daemon=True)
            self._painter.start()
        return self._advance

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()

    def finish(self) -> None:
        """Show nothing more."""
        self._ended.set()
        if self._painter is not None:
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
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            *amount,
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(self._what, total=self._total)
            while not self._ended.wait(0.1):
                finishing = self._done >= self._total and self._unit == "bytes"
                bar.update(task, completed=self._done, description="flushing to disk" if finishing else self._what)

    def _log_lines(self, console: Any) -> None:
        begun = time.monotonic() - _PATIENCE_SECONDS
        while True:
            rate = self._done / (time.monotonic() - begun)
            enough = self._done >= _LEAST_SHARE * self._total
            left = f"{(self._total - self._done) / rate:.0f} s left" if rate and enough else "time left unknown"
            amounts = (
                f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s"
                if self._unit == "bytes"
                else f"{self._done:,} of {self._total:,} {self._unit}, {rate:,.{0 if rate >= 10 else 2}f}/s"
            )
            console.print(f"{self._what}: {amounts}, {left}", highlight=False)
            if self._ended.wait(_LOG_EVERY_SECONDS):
                return
