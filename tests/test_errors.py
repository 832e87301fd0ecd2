"""Messages for users: one line, nothing that a terminal obeys, nothing quoted at length."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.errors import InputError, Interrupted, MachineError, one_line, printable

KINDS = [InputError, MachineError, Interrupted]


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(min_codepoint=0), max_size=2000))
def test_any_message_is_one_short_line_that_can_be_printed(kind: type[Exception], text: str) -> None:
    shown = str(kind(text))
    assert len(shown.splitlines()) <= 1
    assert len(shown) < 7000
    assert not any((ord(letter) < 32 and letter != "\t") or 127 <= ord(letter) < 160 for letter in shown)
    shown.encode()


def test_controls_are_escaped_and_not_removed() -> None:
    assert str(InputError("key '\x1b]0;owned\x07' and \x9b2J, \u202e, \ud800")) == (
        r"key '\x1b]0;owned\x07' and \x9b2J, \u202e, \ud800"
    )
    assert printable("two\nlines,\ta tab and Ümläute") == "two\nlines,\ta tab and Ümläute"


def test_long_values_keep_their_beginning_and_end() -> None:
    shown = str(InputError(f"config.json: key {'a' * 9000 + 'z'!r} is unknown: remove it"))
    assert shown.startswith("config.json: key 'aaa") and shown.endswith("az' is unknown: remove it") and len(shown) < 300
    listed = str(InputError(f"m: layers {['full'] * 900} are too many: write fewer"))
    assert listed.startswith("m: layers ['full'") and listed.endswith(": write fewer") and len(listed) <= 600


def test_commands_to_copy_stay_whole() -> None:
    command = f'python -c "load({"/folder" * 100!r})"'
    assert str(InputError(f"m is a pickle; convert it with: {command}")).endswith(command)


def test_apostrophes_are_no_quotes() -> None:
    text = f"the expert's {'word ' * 50}is the base's"
    assert one_line(text) == text


def test_errors_can_be_pickled() -> None:
    again = pickle.loads(pickle.dumps(MachineError("no space\x1b")))
    assert str(again) == r"no space\x1b" and isinstance(again, MachineError)
