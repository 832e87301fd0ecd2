"""The errors that users see. Each message is one sentence that names the culprit and says what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Literal

Code = Literal[
    "busy",
    "calibration-text",
    "client-cannot-run",
    "damaged-file",
    "input",
    "interrupted",
    "interrupted-run-exists",
    "machine",
    "missing-extra",
    "models-differ",
    "no-network",
    "no-space",
    "not-found",
    "quantised-model",
    "resume-differs",
    "source-changed",
    "target-exists",
    "unknown-name",
    "usage",
    "vocabularies-differ",
]
"""Names of errors that programs may rely on, explained in docs/cli.md."""

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, marks that change the direction of writing, halves of characters; not the tab and the line feed."""
_LONGEST_VALUE, _LONGEST_MESSAGE, _LONGEST_COMMAND = 200, 600, 2000
_VALUE = re.compile(rf"(?<!\w)(['\"])((?:(?!\1).){{{_LONGEST_VALUE + 1},}})\1(?!\w)")
_COMMAND = re.compile(r'python -c "|moerge stats ')


class MoergeError(Exception):
    """Anything moerge reports on purpose; `exit_code` is what the command line returns for it, `code` what programs branch on.

    Its text is one line that a terminal may show: what it quotes from files is escaped, and shortened where it is long.
    """

    exit_code = 1
    code: Code = "machine"

    def __init__(self, *args: object, code: Code | None = None) -> None:
        super().__init__(*args)
        self.code = code or type(self).code

    def __str__(self) -> str:
        return one_line(super().__str__())


class InputError(MoergeError, ValueError):
    """The recipe, a checkpoint or an argument is at fault (exit code 2)."""

    exit_code = 2
    code = "input"


class MachineError(MoergeError, OSError):
    """The machine is at fault: no space left, no permission, a failing disk (exit code 1)."""

    exit_code = 1


class SourceChangedError(MachineError):
    """A file was replaced or overwritten while it was being read: what was made of it mixes two states of it."""

    code = "source-changed"


class Interrupted(MoergeError):
    """Someone stopped it, and it can be continued (exit code 130)."""

    exit_code = 130
    code = "interrupted"


def suggest(unknown: str, known: Iterable[str]) -> str:
    """End the sentence about an unknown name: with the nearest known one, or all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(unknown, names, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(names)}"


def printable(text: str) -> str:
    """Text as it is, but for characters that a terminal would obey instead of showing them: those are escaped."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def one_line(message: str) -> str:
    """A message that may quote anything, as a line to show; a command to copy, which stands at its end, stays whole."""
    text = printable(" ".join(message.split("\n")))
    start = min((match.start() for match in _COMMAND.finditer(text)), default=len(text))
    said, command = text[:start], text[start:]
    said = _VALUE.sub(lambda match: f"{match[1]}{_middle_out(match[2], _LONGEST_VALUE)}{match[1]}", said)
    return _middle_out(said, _LONGEST_MESSAGE) + _middle_out(command, _LONGEST_COMMAND)


def _middle_out(text: str, limit: int) -> str:
    """At most `limit` characters: the beginning, and less of the end."""
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 5]} ... {text[-tail:]}"
