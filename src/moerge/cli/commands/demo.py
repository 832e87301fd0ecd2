"""The demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moerge.cli.options import AsJson


def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("moerge-demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of texts, training and merging.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo in the folder.")] = False,
    json: AsJson = False,
) -> None:
    """Train a small base and three experts, merge them in six ways, and compare: three minutes, nothing is downloaded."""
    from rich.console import Console

    from moerge.cli.console import print_json
    from moerge.demonstration import demo as run_demo

    result = run_demo(out, seed=seed, force=force, console=Console(stderr=True) if json else Console())
    if json:
        print_json(result.to_json())
