"""Interruption by Ctrl-C and SIGTERM, and the hint how to continue."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from moerge.errors import Interrupted


@contextmanager
def resumable(left: Callable[[], bool]) -> Iterator[None]:
    """Work that `--resume` continues. Raises Interrupted where it is broken off and something is `left` of it."""
    try:
        yield
    except KeyboardInterrupt:
        if not left():
            raise
        raise Interrupted("interrupted; continue with the same command and --resume") from None
