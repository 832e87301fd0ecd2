"""Who hears how learning goes."""

from __future__ import annotations

from collections.abc import Callable


class Watch:
    """`start(total)` is called with the texts or tokens to come and returns what is told those done; `note` hears facts.

    `warn` hears what its user should know, `note` too if it is not given.
    """

    def __init__(
        self,
        start: Callable[[int], Callable[[int], None]] = lambda total: lambda done: None,
        note: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        self._start, self.note, self.warn = start, note, warn or note
        self._advance: Callable[[int], None] = lambda done: None

    def begin(self, total: int) -> None:
        """So much is to be done."""
        self._advance = self._start(total)

    def advance(self, amount: int) -> None:
        """So much more is done."""
        self._advance(amount)

    def step(self) -> None:
        """A text has run."""
        self._advance(1)


Progress = Callable[[int], None]
