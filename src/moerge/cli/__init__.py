"""The command line: parse, call, print; nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from io import TextIOWrapper
from itertools import takewhile
from typing import Any, NoReturn

from typer import Abort

from moerge.cli.app import app
from moerge.errors import InputError, Interrupted, MachineError, MoergeError, one_line


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
        _fail(error)
    except (KeyboardInterrupt, Abort):
        _fail(Interrupted("interrupted"))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _usage_or_raise(error)
    sys.exit(code if isinstance(code, int) else 0)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _fail(error: MoergeError) -> NoReturn:
    """Exit with the error's sentence on standard error and, after `--json`, an object on standard output."""
    print(f"moerge: {error}", file=sys.stderr)
    if "--json" in takewhile("--".__ne__, sys.argv[1:]):
        print(json.dumps({"error": {"code": error.code, "message": str(error), "exit_code": error.exit_code}}, indent=2))
    sys.exit(error.exit_code)


def _usage_or_raise(error: Exception) -> NoReturn:
    from moerge.cli.app import usage_message

    message = usage_message(error)
    if message is not None:
        _fail(InputError(message, code="usage"))
    if isinstance(error, MemoryError) or re.search("[Cc]an('t|not) (allocate memory|start new thread)", str(error)):
        said = one_line(str(error)) or "free some"
        _fail(MachineError(f"out of memory: {said}; use fewer --threads, or another machine"))
    raise error
