"""Measuring models: benchmarks and held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from moerge.cli.interruption import resumable
from moerge.cli.options import AllowCalibrationText, AsJson, Device, Quiet, TrustRemoteCode

Checkpoints = Annotated[
    list[str], typer.Argument(metavar="CHECKPOINT...", help="Checkpoint folders or Hub ids.", show_default=False)
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks", metavar="NAMES", help="gsm8k,math,mbpp,humaneval,nq,triviaqa, or any of lm-eval's tasks.", show_default=False
    ),
]
HeldOut = Annotated[
    list[str], typer.Option("--perplexity", metavar="DOMAIN=FILE", help="Held-out text; may be repeated.", show_default=False)
]
Data = Annotated[
    Path | None, typer.Option("--data", metavar="DIR", help="The benchmarks' files; default: the Hub's.", show_default=False)
]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Questions of each benchmark, documents of each text.", show_default=False),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window", min=2, help="Tokens of a text read at once; default: 2048, or what the model takes.", show_default=False
    ),
]
Given = Annotated[
    int | None,
    typer.Option(
        "--given",
        min=0,
        help="Characters of each document that are only read; default: 256 if a model routes sequences, else 0.",
        show_default=False,
    ),
]
RunAs = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option("--dtype", help="Run in this type; default: as stored.", show_default=False),
]
Results = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write results here as JSON and CSV.", show_default=False)
]


def evaluate(
    checkpoints: Checkpoints,
    tasks: Tasks = "",
    perplexity: HeldOut = [],  # noqa: B006
    data: Data = None,
    limit: Limit = None,
    shots: Annotated[
        int | None, typer.Option("--shots", min=0, help="Examples in prompts of lm-eval's tasks.", show_default=False)
    ] = None,
    task_folder: Annotated[
        Path | None,
        typer.Option("--task-folder", metavar="DIR", help="Tasks of your own, as lm-eval has them.", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts or windows that run together.")] = 8,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")] = 512,
    window: Window = None,
    given: Given = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the bootstrap.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask the benchmarks' questions in each model's chat template.")] = False,
    device: Device = None,
    dtype: RunAs = None,
    out: Results = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what lies in the folder of --out.")] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run programs that the models write (mbpp, humaneval).")
    ] = False,
    allow_calibration_text: AllowCalibrationText = False,
    trust_remote_code: TrustRemoteCode = False,
    quiet: Quiet = False,
    json: AsJson = False,
) -> None:
    """Measure checkpoints on benchmarks and on held-out text, with errors and differences from the first one."""
    from moerge.cli.views import evaluation as views
    from moerge.evaluation.benchmarks import parse_tasks
    from moerge.evaluation.run import Settings
    from moerge.evaluation.run import evaluate as run_evaluate
    from moerge.evaluation.store import holds_results
    from moerge.evaluation.texts import parse_texts
    from moerge.progress import TerminalProgress

    chosen: dict[str, Any] = {"data": data, "limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
    chosen |= {"window": window, "given": given, "seed": seed, "chat": chat, "device": device, "dtype": dtype}
    chosen |= {"allow_code_execution": allow_code_execution, "allow_calibration_text": allow_calibration_text}
    chosen |= {"trust_remote_code": trust_remote_code}
    chosen |= {"task_folder": task_folder, "shots": shots, "texts": parse_texts(perplexity)}
    settings = Settings(*(parse_tasks(tasks) if tasks else ()), **chosen)
    if allow_code_execution and any(benchmark.runs_code for benchmark in settings.benchmarks):
        views.wall(quiet=quiet)
    with resumable(lambda: out is not None and holds_results(out)):
        found = run_evaluate(checkpoints, settings, out=out, resume=resume, progress=TerminalProgress(quiet=quiet))
    views.evaluation(found, quiet=quiet, as_json=json)


evaluate.__name__ = "eval"
COMMANDS = (evaluate,)
