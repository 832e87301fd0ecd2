"""Commands and their options. Each imports what it needs when it runs, so that `--help` stays instant."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="moerge",
    help="Merge fine-tuned language models into a dense model or a mixture of experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
CheckpointName = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint folder or a Hub id.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Replace the recipe's seeds.", show_default=False)]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads; default: the cores available.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]


def usage_message(error: Exception) -> str | None:
    """What a wrong call should read, or None if `error` is not about the call; "" where the help was shown instead."""
    show = getattr(error, "format_message", None)
    if show is None:
        return None
    if not show():
        return ""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "moerge"
    return f"{show()} (see: {command} --help)"


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"moerge {installed('moerge')}")
        raise typer.Exit


@app.command()
def plan(recipe: RecipeFile, seed: Seed = None, threads: Threads = None, json: AsJson = False) -> None:
    """Print what a recipe amounts to; no tensor is read."""
    from moerge.cli import show
    from moerge.pipeline import default_threads
    from moerge.pipeline import plan as make_plan

    planned = make_plan(recipe, seed=seed)
    show.plan(planned, threads or default_threads(), as_json=json)


@app.command()
def merge(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted merge into OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that moerge made in OUT.")] = False,
    seed: Seed = None,
    threads: Threads = None,
    max_shard_size: Annotated[str, typer.Option("--max-shard-size", help="Largest shard, such as 500MB or 5GB.")] = "5GB",
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Go on where inputs hold NaN or infinity.")] = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Merge as the recipe says and write the checkpoint folder OUT."""
    from moerge.cli import show
    from moerge.cli.progress import Progress
    from moerge.pipeline import merge as run_merge
    from moerge.recipe import load_recipe

    options: dict[str, Any] = {
        "resume": resume,
        "force": force,
        "threads": threads,
        "max_shard_bytes": show.parse_size(max_shard_size),
        "allow_nonfinite": allow_nonfinite,
    }
    loaded = load_recipe(recipe, seed=seed)
    with Progress("merging", quiet=quiet) as progress:
        result = run_merge(loaded, out, progress=lambda planned: progress.start(planned.work_bytes), **options)
    show.merge(result, quiet=quiet, as_json=json)


@app.command()
def verify(checkpoint: CheckpointName, threads: Threads = None, quiet: Quiet = False, json: AsJson = False) -> None:
    """Check that every tensor is present, finite, of the right shape, and what the manifest says."""
    from moerge.checkpoint.locate import locate
    from moerge.cli import show
    from moerge.cli.progress import Progress
    from moerge.inspection import verify as run_verify

    total = locate(checkpoint).nbytes
    with Progress("verifying", quiet=quiet) as progress:
        found = run_verify(checkpoint, threads=threads, progress=progress.start(total))
    show.verification(found, quiet=quiet, as_json=json)
    if found.problems:
        raise typer.Exit(2)


@app.command()
def inspect(checkpoint: CheckpointName, json: AsJson = False) -> None:
    """Show a checkpoint's family, sizes, roles, tokenizer, and how it was made."""
    from moerge.cli import show
    from moerge.inspection import inspect as run_inspect

    show.inspection(run_inspect(checkpoint), as_json=json)


TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the code that the checkpoint comes with.")]


@app.command()
def generate(
    checkpoint: CheckpointName,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens to write.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0: always the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of sampling.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Continue a text with a checkpoint; the text it writes goes to standard output."""
    from moerge.cli import show
    from moerge.inference.generation import generate as run_generate

    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    show.generation(run_generate(checkpoint, prompt, trust_remote_code=trust_remote_code, **options), as_json=json)


@app.command()
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
    trust_remote_code: TrustRemoteCode = False,
    json: AsJson = False,
) -> None:
    """Show how a MoE routes texts: the share of each expert, accuracy, entropy, and balance."""
    from moerge.cli import show
    from moerge.inference.routes import parse_texts
    from moerge.inference.routes import route as run_route

    found = run_route(checkpoint, parse_texts(text), limit=limit, tokens=tokens, trust_remote_code=trust_remote_code)
    if out is not None:
        found.write(out)
    show.routes(found, as_json=json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="The folder to write.")] = Path("moerge-demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of texts, training and merging.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier demo in the folder.")] = False,
    json: AsJson = False,
) -> None:
    """Train a small base and three experts, merge them in six ways, and compare: three minutes, nothing is downloaded."""
    from rich.console import Console

    from moerge.cli import show
    from moerge.demo import run as run_demo

    result = run_demo(out, seed=seed, force=force, console=Console(stderr=True) if json else Console())
    if json:
        show.print_json(result.to_json())
