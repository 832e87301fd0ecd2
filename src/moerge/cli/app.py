"""The command `moerge`."""

from __future__ import annotations

from typing import Annotated

import typer

from moerge.cli.commands import COMMANDS

app = typer.Typer(
    name="moerge",
    help="Merge fine-tuned language models into a dense model or a mixture of experts.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in COMMANDS:
    app.command()(command)


def usage_message(error: Exception) -> str | None:
    """Return the message for a wrong call, None if `error` is not about the call."""
    show = getattr(error, "format_message", None)
    if show is None:
        return None
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "moerge"
    return f"{show()} (see: {command} --help)"


@app.callback(invoke_without_command=True)
def _main(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        import moerge

        print(f"moerge {moerge.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)
