"""Running models: text from them, and where they route it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moerge.cli.options import AllowCalibrationText, AsJson, CheckpointName, TrustRemoteCode
from moerge.errors import InputError


def generate(
    checkpoint: CheckpointName,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="The text to continue; with --chat a question.", show_default=False),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the chat template; without --prompt, turn by turn.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="With --chat: the system message.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
    route_per: Annotated[
        Literal["turn", "conversation"],
        typer.Option("--route-per", help="With --chat: route sequences before each answer, or once."),
    ] = "turn",
    route_by: Annotated[
        Literal["prompt", "last-turn"],
        typer.Option("--route-by", help="With --chat: route by everything said so far, or by the last question."),
    ] = "prompt",
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Continue a text with a checkpoint, or talk with it; what it writes goes to standard output."""
    from moerge.cli.views import running as views
    from moerge.inference.generation import generate as run_generate

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    if not chat:
        if prompt is None or system is not None or (route_per, route_by) != ("turn", "prompt"):
            missing = "name the text to continue with --prompt, or talk with the model with --chat"
            raise InputError(
                missing if prompt is None else "--system, --route-per and --route-by are for conversations: add --chat"
            )
        views.generation(run_generate(checkpoint, prompt, trust_remote_code=trust_remote_code, **options), as_json=json)
        return
    from moerge.cli.views.talking import talk
    from moerge.inference.chat import Chat
    from moerge.runtime.loading import load

    loaded = load(checkpoint, trust_remote_code=trust_remote_code)
    conversation = Chat(loaded, system=system, route_per=route_per, route_by=route_by, **options)
    if prompt is None:
        talk(conversation, as_json=json)
    else:
        views.generation(conversation.ask(prompt), as_json=json)


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
    route_by: Annotated[
        Literal["prompt", "last-turn"],
        typer.Option("--route-by", help="Route conversations by what stands before the last answer, or the last question."),
    ] = "prompt",
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
        route_by=route_by,
        allow_calibration_text=allow_calibration_text,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        write_routes(found, out)
    views.routes(found, as_json=json)


COMMANDS = (generate, route)
