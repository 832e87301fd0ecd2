"""Writing checkpoints in other programs' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.options import AsJson, Quiet


def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
    gguf: Annotated[bool, typer.Option("--gguf", help="As a GGUF file, with the converter of your own llama.cpp.")] = False,
    outtype: Annotated[str, typer.Option("--outtype", help="Element type: auto, f32, f16, bf16 or q8_0.")] = "auto",
    converter: Annotated[
        Path | None,
        typer.Option(
            "--converter", help="Path of convert_hf_to_gguf.py; default: in $LLAMA_CPP, or on the PATH.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Write a checkpoint as a GGUF file, after asking what llama.cpp cannot do with it."""
    from moerge import exporting
    from moerge.cli.views import exporting as views
    from moerge.errors import InputError

    if not gguf:
        raise InputError("no format was named: add --gguf", code="usage")
    views.exported(
        exporting.export(checkpoint, out, outtype=outtype, converter=converter, force=force), quiet=quiet, as_json=json
    )


COMMANDS = (export,)
