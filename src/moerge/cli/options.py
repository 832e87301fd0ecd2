"""Arguments and options that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
CheckpointName = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or a Hub id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Replace the recipe's seeds.", show_default=False)]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, max=1024, help="Threads; default: the cores available.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]
Device = Annotated[
    str | None, typer.Option("--device", help="Such as cuda:1; default: the GPU where there is one.", show_default=False)
]
AllowCalibrationText = Annotated[
    bool, typer.Option("--allow-calibration-text", help="Go on where a text was used to calibrate or tune a checkpoint.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that the checkpoint comes with.")]
For = Annotated[
    list[str],
    typer.Option("--for", metavar="CLIENT", help="A program that is to run the result; may be repeated.", show_default=False),
]
