"""`moerge demo` from its first text to its last perplexity; start reading at `run`."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from moerge.demonstration.progress import counting
from moerge.demonstration.recipes import NAMES, write_recipes
from moerge.demonstration.result import DemoModel, DemoResult, demo_model
from moerge.demonstration.runtime import import_torch
from moerge.demonstration.text import Corpus, make_corpora, write_corpora
from moerge.demonstration.train import TRAININGS, total_steps, train_models
from moerge.errors import InputError, MachineError

_MARK = ".moerge-demo"
"""A file that says that the folder is the demo's to replace."""


def demo(
    out: str | Path = "moerge-demo", *, seed: int = 0, force: bool = False, scale: float = 1.0, console: Console | None = None
) -> DemoResult:
    """Train a small base and three experts, merge them in six ways, evaluate all ten, and leave everything in `out`.

    `scale` multiplies text and training steps, `force` replaces an earlier demo in `out`. What happens is told to
    `console`, by default standard error. Raises InputError where `out` is in use or torch or transformers is missing,
    MachineError where `out` cannot be written or this Python has no source of its standard library.
    """
    out, console = Path(out), console or Console(stderr=True)
    seconds: dict[str, float] = {}
    _check(out, force)
    with _phase("imports", seconds, console):
        import_torch()
    with _machine_errors(out):
        _clear(out)
        with _phase("texts", seconds, console):
            corpora = make_corpora(seed, scale=scale)
            write_corpora(corpora, out / "text")
        with _phase("training", seconds, console):
            models = _train(corpora, out / "models", seed, scale)
        recipes = write_recipes(out / "recipes", [name for name in models if name != "base"], seed)
        with _phase("merging", seconds, console):
            for name, recipe in recipes.items():
                _merge(recipe, out / "merged" / name, console)
        with _phase("evaluation", seconds, console):
            measured = _evaluate(out, corpora)
        result = DemoResult(out=out, seed=seed, models=measured, seconds=seconds)
        (out / "results.json").write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        (out / "results.md").write_text(result.to_markdown(), encoding="utf-8")
    console.print(result)
    console.print(_next_steps(out), highlight=False, markup=False, soft_wrap=True)
    return result


def _check(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose another folder with --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / _MARK).exists():
        raise InputError(f"{out} is not empty and not from a demo; choose another folder with --out", code="target-exists")
    if not force:
        raise InputError(
            f"{out} already holds a demo; replace it with --force or choose another folder with --out", code="target-exists"
        )


def _clear(out: Path) -> None:
    """Make `out` and leave nothing of an earlier demo in it; files of others stay."""
    for folder in ("text", "models", "recipes", "merged"):
        shutil.rmtree(out / folder, ignore_errors=True)
    for file in ("results.json", "results.md"):
        (out / file).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _train(corpora: Mapping[str, Corpus], folder: Path, seed: int, scale: float) -> dict[str, Path]:
    with counting(total_steps(scale)) as advance:
        return train_models(
            corpora, folder, seed=seed, scale=scale, on_step=lambda name, loss: advance(f"training {name}, loss {loss:.2f}")
        )


def _merge(recipe: Path, out: Path, console: Console) -> None:
    """Run the command that a user would."""
    command = ["merge", str(recipe), str(out)]
    console.print(f"  $ {shlex.join(['moerge', *command])}", highlight=False, markup=False, soft_wrap=True)
    done = subprocess.run(
        [sys.executable, "-m", "moerge", *command, "--quiet"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        failure = InputError if done.returncode == InputError.exit_code else MachineError
        raise failure(done.stderr.strip().removeprefix("moerge: ") or f"{shlex.join(command)} failed")


def _evaluate(out: Path, corpora: Mapping[str, Corpus]) -> tuple[DemoModel, ...]:
    from moerge.demonstration.evaluate import perplexities

    kinds = {f"models/{name}": "base" if name == "base" else "expert" for name in TRAININGS}
    kinds |= {f"merged/{name}": name.split("-")[1] for name in NAMES}
    models = []
    with counting(len(kinds)) as advance:
        for path, kind in kinds.items():
            models.append(demo_model(path, kind, perplexities(out / path, corpora)))
            advance(f"evaluating {path}")
    return tuple(models)


def _next_steps(out: Path) -> str:
    recipe, merged = (shlex.quote(str(out / path)) for path in ("recipes/ties-moe.yaml", "merged/ties-moe"))
    return f"""Everything is in {out}: models, text, recipes, merged, results.json, results.md. To go on:
  $ moerge plan {recipe}
  $ moerge inspect {merged}
or change density, scale or top_k in a recipe and merge it into a new folder. The merged models are ordinary Llama and
Mixtral folders: transformers.AutoModelForCausalLM.from_pretrained loads them."""


@contextmanager
def _phase(name: str, seconds: dict[str, float], console: Console) -> Iterator[None]:
    """Time a phase and say when it is over."""
    begun = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - begun, 1)
    console.print(f"{name}: {seconds[name]:.0f} s", highlight=False)


@contextmanager
def _machine_errors(out: Path) -> Iterator[None]:
    """A full disk or a missing permission, in one sentence."""
    try:
        yield
    except OSError as error:
        if isinstance(error, MachineError):
            raise
        raise MachineError(f"{error.filename or out} cannot be written: {error.strerror or error}") from error
