"""Who hears how learning goes."""

from __future__ import annotations

from collections.abc import Callable


class Watch:
    """`start(total)` is called with the number of texts to run and returns what is told each one done; `note` hears facts."""

    def __init__(
        self,
        start: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._start, self.note = start, note
        self._advance: Callable[[int], None] = lambda done: None

    def begin(self, texts: int) -> None:
        """So many texts will run."""
        self._advance = self._start(texts)

    def step(self) -> None:
        """A text has run."""
        self._advance(1)
