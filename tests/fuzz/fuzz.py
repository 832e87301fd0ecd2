"""Mutate every kind of file that moerge reads, run what reads it, and count how that ends.

    python tests/fuzz/fuzz.py --cases 36000            # all kinds, from seed 0; about half an hour of one core and more
    python tests/fuzz/fuzz.py --only config:17         # one case again, with its traceback

Each case changes one place (some two or three) of one file, drawn by its seed. Right ends are success, InputError and
MachineError, with one line of text; another exception is a fault, as is half an output after an error and more than 20 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

import moerge
from moerge.errors import InputError, MachineError, MoergeError
from tests.fuzz.mutations import mutated, mutated_bytes, mutated_text
from tests.fuzz.world import make_world

SECONDS = 20
Mutation = Callable[[Path, Random], str]
Run = Callable[[Path, Random], None]


class Slow(BaseException):
    """A case takes too long."""


def in_json(*names: str) -> Mutation:
    def mutate(folder: Path, rng: Random) -> str:
        path = folder / rng.choice(names)
        if rng.random() < 0.15:
            return in_bytes(path.relative_to(folder).as_posix())(folder, rng)
        value, what = mutated(json.loads(path.read_text()), rng)
        path.write_text(json.dumps(value))
        return f"{path.name}: {what}"

    return mutate


def in_lines(name: str) -> Mutation:
    def mutate(folder: Path, rng: Random) -> str:
        path = folder / name
        lines = path.read_text().splitlines()
        at = rng.randrange(len(lines))
        value, what = mutated(json.loads(lines[at]), rng)
        path.write_text("\n".join([*lines[:at], json.dumps(value), *lines[at + 1 :]]) + "\n")
        return f"{path.name}, line {at + 1}: {what}"

    return mutate


def in_header(*names: str) -> Mutation:
    def mutate(folder: Path, rng: Random) -> str:
        path = folder / rng.choice(names)
        content = path.read_bytes()
        if rng.random() < 0.4:
            return in_bytes(path.relative_to(folder).as_posix())(folder, rng)
        (length,) = struct.unpack("<Q", content[:8])
        header, what = mutated(json.loads(content[8 : 8 + length]), rng)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
        return f"{path.name}: {what}"

    return mutate


def in_bytes(*names: str) -> Mutation:
    def mutate(folder: Path, rng: Random) -> str:
        path = folder / rng.choice(names)
        content, what = mutated_bytes(path.read_bytes(), rng)
        path.write_bytes(content)
        return f"{path.name}: {what}"

    return mutate


def in_yaml(*names: str) -> Mutation:
    def mutate(folder: Path, rng: Random) -> str:
        path = folder / rng.choice(names)
        if rng.random() < 0.4:
            text, what = mutated_text(path.read_text(), rng)
        else:
            value, what = mutated(yaml.safe_load(path.read_text()), rng)
            text = yaml.safe_dump(value, sort_keys=False) if rng.random() < 0.5 else json.dumps(value)
        path.write_text(text, encoding="utf-8", errors="replace")
        return f"{path.name}: {what}"

    return mutate


def merging(*recipes: str) -> Run:
    def run(folder: Path, rng: Random) -> None:
        plan = moerge.plan(folder / rng.choice(recipes))
        plan.summary(1)
        show_plan(plan)
        merged(plan, folder / "out")
        if rng.random() < 0.2:
            moerge.verify(folder / "out", threads=1)

    return run


def merged(recipe: Any, out: Path, **options: Any) -> None:
    try:
        moerge.merge(recipe, out, threads=1, **options)
    except MoergeError:
        assert not out.exists(), "half an output"
        raise


def show_plan(plan: Any) -> None:
    from moerge.cli.views import merging

    merging.plan(plan, 1, as_json=False)


def looking(*names: str) -> Run:
    def run(folder: Path, rng: Random) -> None:
        from moerge.cli.views import merging

        merging.inspection(moerge.inspect(folder / rng.choice(names)), as_json=False)

    return run


def verifying(*names: str) -> Run:
    def run(folder: Path, rng: Random) -> None:
        moerge.verify(folder / rng.choice(names), threads=1)

    return run


def comparing(folder: Path, rng: Random) -> None:
    from moerge.comparison.flow import compare

    compare(folder / "recipe.yaml", threads=1).to_json()


def running(*names: str) -> Run:
    """One of the commands that run a model."""

    def run(folder: Path, rng: Random) -> None:
        from moerge.evaluation.run import Settings, evaluate
        from moerge.inference.generation import generate
        from moerge.inference.routes import route

        checkpoint, kind = folder / rng.choice(names), rng.randrange(3)
        if kind == 0:
            generate(checkpoint, "w3 w4", max_new_tokens=3, temperature=rng.choice([0.0, 0.7]))
        elif kind == 1:
            evaluate([checkpoint], Settings(texts={"a": str(folder / "text.txt")}, given=2, device="cpu"))
        else:
            route(checkpoint, {"math": str(folder / "text.txt")}, limit=2, tokens=4)

    return run


def in_dict(folder: Path, rng: Random) -> str:
    names = ["recipe.yaml", "moe.yaml", "routed.yaml", "lora.yaml", "fisher.yaml", "learned.yaml", "mergekit.yaml", "tune.yaml"]
    name = rng.choice(names)
    value, what = mutated(yaml.safe_load((folder / name).read_text()), rng)
    VALUES["dict"] = rng.choice([value, value, value, value, {1: value}, [value], 5, None, "\0", {**value, "x": object()}])
    VALUES["name"] = name
    return f"{name} as a dict: {what}"


VALUES: dict[str, Any] = {}


def from_dict(folder: Path, rng: Random) -> None:
    from moerge.tuning.settings import load_tuning

    if VALUES["name"] == "tune.yaml":
        load_tuning(VALUES["dict"])
    else:
        merged(VALUES["dict"], folder / "out")


def tuning(folder: Path, rng: Random) -> None:
    from moerge.tuning.run import plan_tune
    from moerge.tuning.settings import load_tuning

    load_tuning(folder / "tune.yaml")
    if rng.random() < 0.25:
        plan_tune(folder / "tune.yaml")


def resuming(folder: Path, rng: Random) -> None:
    moerge.merge(folder / "recipe.yaml", folder / "stopped", threads=1, resume=True)
    assert (folder / "stopped/model.safetensors").read_bytes() == (folder / "merged/model.safetensors").read_bytes(), (
        "other bytes"
    )


def reporting(folder: Path, rng: Random) -> None:
    from moerge.reporting.flow import report

    report(folder / "results").to_html()


MODEL = ("base", "math", "code")
RESULTS = ("merged", "mixed", "routed")
CONFIGS = tuple(f"{name}/config.json" for name in MODEL)
TOKENIZERS = tuple(f"{name}/{file}.json" for name in MODEL for file in ("tokenizer", "tokenizer_config"))
PLANS = merging("recipe.yaml", "moe.yaml", "routed.yaml")
OF_A_MODEL: tuple[Run, ...] = (PLANS, PLANS, PLANS, looking(*MODEL), verifying(*MODEL), comparing, running(*MODEL))
OF_A_RESULT: tuple[Run, ...] = (looking(*RESULTS), verifying(*RESULTS), running(*RESULTS))
OF_STATISTICS = (merging("fisher.yaml", "regmean.yaml"),)

KINDS: dict[str, tuple[Mutation, Sequence[Run]]] = {
    "safetensors": (in_header(*(f"{name}/model.safetensors" for name in MODEL)), OF_A_MODEL),
    "config": (in_json(*CONFIGS), OF_A_MODEL),
    "result config": (in_json(*(f"{name}/config.json" for name in RESULTS)), OF_A_RESULT),
    "generation config": (in_json(*(f"{name}/generation_config.json" for name in MODEL)), (PLANS, running(*MODEL))),
    "index": (
        in_json("sharded/math/model.safetensors.index.json"),
        (merging("sharded.yaml"), looking("sharded/math"), verifying("sharded/math"), running("sharded/math")),
    ),
    "tokenizer": (
        in_json(*(f"{name}/tokenizer.json" for name in MODEL), *(f"{name}/tokenizer_config.json" for name in MODEL)),
        OF_A_MODEL,
    ),
    "recipe": (in_yaml("recipe.yaml", "moe.yaml", "routed.yaml", "lora.yaml", "sharded.yaml"), ()),
    "dict": (in_dict, (from_dict,)),
    "mergekit": (in_yaml("mergekit.yaml", "slices.yaml"), ()),
    "adapter": (in_json("lora/adapter_config.json"), (merging("lora.yaml"), looking("lora"))),
    "adapter weights": (in_header("lora/adapter_model.safetensors"), (merging("lora.yaml"), looking("lora"))),
    "statistics": (in_header("stats/math.safetensors", "stats/code.safetensors"), OF_STATISTICS),
    "tune": (in_yaml("tune.yaml"), (tuning,)),
    "manifest": (in_json(*(f"{name}/moerge.json" for name in RESULTS)), OF_A_RESULT),
    "coefficients": (in_json("k.json"), (merging("learned.yaml"),)),
    "journal": (in_lines(".stopped.moerge-partial/journal.jsonl"), (resuming,)),
    "report": (lambda folder, rng: in_json(*result_files(folder))(folder, rng), (reporting,)),
}


def result_files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "results").rglob("*.json"))


def case(world: Path, folder: Path, kind: str, seed: int) -> tuple[str, str]:
    """What was changed, and how it ended: ok, InputError, MachineError, or the place of another exception."""
    shutil.copytree(world, folder)
    try:
        rng, changes = Random(f"{kind}:{seed}"), list[str]()
        try:
            run = damage(folder, kind, rng, changes)
        except (ValueError, KeyError, TypeError, RecursionError, OSError, yaml.YAMLError):
            return "", "no case"  # a second change of what is no JSON any more
        return "; ".join(changes), outcome(run, folder, rng)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def damage(folder: Path, kind: str, rng: Random, changes: list[str]) -> Run:
    """Change files, note how, and say what is to read them."""
    mutate, runs = KINDS[kind]
    for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
        changes.append(mutate(folder, rng))
    return rng.choice(runs) if runs else merging(changes[-1].partition(":")[0])


def outcome(run: Run, folder: Path, rng: Random) -> str:
    try:
        with limited(), quiet():
            run(folder, rng)
    except (InputError, MachineError) as error:
        return bad_text(str(error)) or ("MachineError" if isinstance(error, MachineError) else "InputError")
    except Slow:
        return "slow"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        TRACES.append("".join(traceback.format_exception(error)))
        return place(error)
    return "ok"


TRACES: list[str] = []


def bad_text(text: str) -> str | None:
    if len(text.splitlines()) != 1 or len(text) > 3000 or any(ord(letter) < 32 and letter != "\t" for letter in text):
        return f"bad text: {text[:300]!r}"
    return None


def place(error: BaseException) -> str:
    """The exception's kind and the innermost line of moerge."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "moerge/" in frame.filename and "fuzz" not in frame.filename
    ]
    inner = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {inner.filename.rpartition('moerge/')[2]}:{inner.lineno}: {str(error)[:120]!a}"


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: Any) -> None:
        raise Slow

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: other programs may be busy
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", category=RuntimeWarning, module="moerge")
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = nothing, nothing
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def fuzz(folder: Path, cases: int, start: int = 0, kinds: Sequence[str] = tuple(KINDS), seconds: float = 1e9) -> Counter[str]:
    """Run `cases` in all, kind by kind in turn; faults are printed as they are seen first."""
    world = folder / "world"
    make_world(world)
    ends: Counter[str] = Counter()
    begun = time.monotonic()
    for number in range(cases):
        kind, seed = kinds[number % len(kinds)], start + number // len(kinds)
        what, end = case(world, folder / f"case{number}", kind, seed)
        if is_fault(end) and not ends[end]:
            print(f"{kind}:{seed}  {end}\n    {what[:300]}", flush=True)
        ends[end] += 1
        if number % 500 == 499:
            print(f"  {number + 1} cases, {time.monotonic() - begun:.0f} s", flush=True)
        if time.monotonic() - begun > seconds:
            break
    return ends


def is_fault(end: str) -> bool:
    return end not in ("ok", "InputError", "MachineError", "no case")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=36000)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this time")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--only", metavar="KIND:SEED", help="one case, with its traceback")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="moerge-fuzz-") as folder:
        if options.only:
            kind, _, seed = options.only.rpartition(":")
            make_world(Path(folder) / "world")
            print(*case(Path(folder) / "world", Path(folder) / "case", kind, int(seed)), sep="\n")
            print(*TRACES)
            return
        ends = fuzz(Path(folder), options.cases, options.start, options.kinds, options.seconds)
    faults = {end: count for end, count in ends.items() if is_fault(end)}
    print(f"{sum(ends.values()):,} cases: " + ", ".join(f"{end} {ends[end]:,}" for end in ends if end not in faults))
    print(f"faults: {sum(faults.values())} in {len(faults)} places")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
