"""The errors that users see. Each message is one sentence that names the culprit and says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoergeError(Exception):
    """Anything moerge reports on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(MoergeError, ValueError):
    """The recipe, a checkpoint or an argument is at fault (exit code 2)."""

    exit_code = 2


class MachineError(MoergeError, OSError):
    """The machine is at fault: no space left, no permission, a failing disk (exit code 1)."""

    exit_code = 1


class SourceChangedError(MachineError):
    """A file was replaced or overwritten while it was being read: what was made of it mixes two states of it."""


class Interrupted(MoergeError):
    """Someone stopped it, and it can be continued (exit code 130)."""

    exit_code = 130


def suggest(unknown: str, known: Iterable[str]) -> str:
    """How to end the sentence about an unknown name: the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}"
