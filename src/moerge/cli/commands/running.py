"""Running models: text from them, and where they route it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moerge.cli.options import AllowCalibrationText, AsJson, CheckpointName, TrustRemoteCode


def generate(
    checkpoint: CheckpointName,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Continue a text with a checkpoint; the text it writes goes to standard output."""
    from moerge.cli.views import running as views
    from moerge.inference.generation import generate as run_generate

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    views.generation(run_generate(checkpoint, prompt, trust_remote_code=trust_remote_code, **options), as_json=json)


def route(
    checkpoint: CheckpointName,
    text: Annotated[
        list[str], typer.Option("--text", metavar="NAME=FILE", help="Text to route, such as math=math.jsonl.", show_default=False)
    ],
    limit: Annotated[int, typer.Option("--limit", min=1, help="Documents of each text.")] = 100,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of each document.")] = 512,
    out: Annotated[
        Path | None, typer.Option("--out", help="Also write route.json and route.csv here.", show_default=False)
    ] = None,
    oracle: Annotated[
        bool,
        typer.Option("--oracle/--no-oracle", help="Also run each expert alone, to see which has the lowest loss."),
    ] = True,
    allow_calibration_text: AllowCalibrationText = False,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Show how a MoE routes texts: the share of each expert, accuracy against domain and oracle, entropy, and balance."""
    from moerge.cli.views import running as views
    from moerge.inference.figure import write_routes
    from moerge.inference.routes import parse_texts
    from moerge.inference.routes import route as run_route

    found = run_route(
        checkpoint,
        parse_texts(text),
        limit=limit,
        tokens=tokens,
        oracle=oracle,
        allow_calibration_text=allow_calibration_text,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        write_routes(found, out)
    views.routes(found, as_json=json)


COMMANDS = (generate, route)
