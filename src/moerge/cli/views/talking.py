"""A conversation in the terminal, or with lines of a pipe: a line is a turn."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from moerge.cli.console import print_json, say
from moerge.errors import InputError, printable
from moerge.inference.chat import Chat

_NEW = "/new"


def talk(chat: Chat, *, as_json: bool) -> None:
    """Answer what the user types, until Ctrl-D or Ctrl-C at the prompt; Ctrl-C ends an answer. `/new` begins anew.

    Answers are shown while they are written, or with `as_json` as one object a line. From a pipe an error ends it.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        say(f"{chat.loaded.name}: {_NEW} begins a new conversation, Ctrl-D ends", stderr=True)
    for text in _lines(terminal):
        if text.strip() == _NEW:
            chat.reset()
            continue
        try:
            found = chat.ask(text, None if as_json else _show)
        except InputError as error:
            if not terminal:
                raise
            say(str(error), stderr=True)
            continue
        except KeyboardInterrupt:
            print(flush=True)
            continue
        if as_json:
            print_json(found.to_json())
            continue
        print(flush=True)
        if found.routing and terminal:
            say(", ".join(f"{name} {weight:.0%}" for name, weight in found.routing.items() if weight), stderr=True)


def _lines(terminal: bool) -> Iterator[str]:
    if terminal:
        import readline  # noqa: F401 (arrow keys and history in input())
    while True:
        try:
            text = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print(flush=True)
            return
        if text.strip():
            yield text


def _show(text: str) -> None:
    print(printable(text), end="", flush=True)
