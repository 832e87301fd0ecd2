"""Progress on standard error: bytes, rate, time left; only once work has taken two seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

_PATIENCE_SECONDS = 2.0
_LOG_EVERY_SECONDS = 15.0


class Progress:
    """A context manager; `start(total)` returns the function that is told the bytes done, from any thread."""

    def __init__(self, what: str, *, quiet: bool) -> None:
        self._what, self._quiet = what, quiet
        self._done, self._total = 0, 0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._painter: threading.Thread | None = None

    def start(self, total: int) -> Callable[[int], None]:
        """Begin to count towards `total` bytes."""
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

        columns = (
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(self._what, total=self._total)
            while not self._ended.wait(0.1):
                finishing = self._done >= self._total
                bar.update(task, completed=self._done, description="flushing to disk" if finishing else self._what)

    def _log_lines(self, console: Any) -> None:
        begun = time.monotonic() - _PATIENCE_SECONDS
        while True:
            rate = self._done / (time.monotonic() - begun)
            left = (self._total - self._done) / rate if rate else float("inf")
            console.print(
                f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate / 1e9:.2f} GB/s, {left:.0f} s left",
                highlight=False,
            )
            if self._ended.wait(_LOG_EVERY_SECONDS):
                return
