"""The state of the installation."""

from __future__ import annotations

import typer

from moerge.cli.options import AsJson


def doctor(json: AsJson = False) -> None:
    """Print versions, extras and what they lack, threads, GPUs, cache folders, and how generated code is contained."""
    from moerge.cli.views import doctor as views
    from moerge.doctor import diagnose

    state = diagnose()
    views.diagnosis(state, as_json=json)
    if not state.healthy:
        raise typer.Exit(1)


COMMANDS = (doctor,)
