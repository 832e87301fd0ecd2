"""The command line: parse, call, print; nothing else."""

from __future__ import annotations

import os
import re
import signal
import sys
from io import TextIOWrapper
from typing import Any, NoReturn

from typer import Abort

from moerge.cli.app import app
from moerge.errors import Interrupted, MoergeError, one_line


def main() -> NoReturn:
    """Run the command and exit with its code: 0 done, 1 the machine failed, 2 the input is at fault, 130 interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, TextIOWrapper):  # a console that lacks a letter is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    code = None
    try:
        code = app(prog_name="moerge", standalone_mode=False)
        if code == Interrupted.exit_code:  # some versions of typer turn KeyboardInterrupt into this, others into Abort
            raise KeyboardInterrupt
    except MoergeError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, Abort):
        _fail("interrupted", Interrupted.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _usage_or_raise(error)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    if message:
        print(f"moerge: {one_line(message)}", file=sys.stderr)
    sys.exit(code)


def _usage_or_raise(error: Exception) -> NoReturn:
    from moerge.cli.app import usage_message

    message = usage_message(error)
    if message is not None:
        _fail(message, 2)
    if isinstance(error, MemoryError) or re.search("[Cc]an('t|not) (allocate memory|start new thread)", str(error)):
        _fail(f"out of memory: {one_line(str(error)) or 'free some'}; use fewer --threads, or another machine", 1)
    raise error
