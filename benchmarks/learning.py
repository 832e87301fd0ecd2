"""What a step of learning coefficients costs in time and memory, beside the obvious way to do it.

    python benchmarks/learning.py --runs 3

Random Llama-shaped models in bfloat16, a base and E experts; one text of T tokens, float32 arithmetic. Each case runs in a
process of its own, so that its peak memory is its own, and every round runs every case once:

- `ordinary`: forward and backward pass of the base with gradients of all its weights, what fine-tuning it would take;
- `streamed`: moerge's step, a coefficient for each matrix and expert, task vectors read from disk layer by layer;
- `straightforward`: all task vectors in memory, the whole merged model rebuilt as a function of the coefficients
  (torch.func.functional_call over all parameters), as published code does it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from machine import facts
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

SHAPE = {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
CASES = ("ordinary", "streamed", "straightforward")


def main() -> None:
    """Make the models, run the rounds, print the table, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a run, after one that is not counted")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "learning")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(_measure(options)))
        return
    console, found = Console(width=120), []
    with tempfile.TemporaryDirectory() as folder:
        _make(Path(folder), max(options.experts))
        for run in range(options.runs):
            for experts in options.experts:
                for case in CASES:
                    found.append({"run": run, "case": case, "experts": experts, **_spawn(case, experts, Path(folder), options)})
                    console.print(found[-1], highlight=False)
    _report(found, options, console)


def _spawn(case: str, experts: int, folder: Path, options: Any) -> dict[str, float]:
    arguments = ["--case", case, "--experts", str(experts), "--folder", str(folder)]
    arguments += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _make(folder: Path, experts: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True, max_position_embeddings=1024))
    models = {"base": base.to(torch.bfloat16)}
    models["base"].save_pretrained(folder / "base")
    for number in range(experts):
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.002 * torch.randn_like(parameter))
        base.save_pretrained(folder / f"expert{number}")


def _measure(options: Any) -> dict[str, float]:
    """Seconds a step (median), and the process's peak memory in bytes, interpreter and libraries included."""
    import torch

    torch.manual_seed(0)
    ids_1T = torch.randint(SHAPE["vocab_size"], (1, options.tokens))
    folder, experts = options.folder, options.experts[0]
    step = {"ordinary": _ordinary, "streamed": _streamed, "straightforward": _straightforward}[options.case](
        folder, experts, ids_1T
    )
    times = []
    for _ in range(options.steps + 1):
        begun = time.perf_counter()
        step()
        times.append(time.perf_counter() - begun)
    return {"seconds": statistics.median(times[1:]), "peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    """The most that this process held; getrusage would count what its parent held when it started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _loss(logits_1TV: Any, ids_1T: Any) -> Any:
    import torch.nn.functional as F

    return F.cross_entropy(logits_1TV[0, :-1].float(), ids_1T[0, 1:])


def _ordinary(folder: Path, experts: int, ids_1T: Any) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).train()

    def step() -> None:
        _loss(model(input_ids=ids_1T, use_cache=False).logits, ids_1T).backward()
        model.zero_grad()

    return step


def _streamed(folder: Path, experts: int, ids_1T: Any) -> Callable[[], None]:
    import torch

    from moerge.learning.merged_parameters import merged_parameters
    from moerge.learning.model import MergingModel
    from moerge.planning.build import build_plan
    from moerge.recipe import load_recipe
    from moerge.recipe.learning import Learning

    names = {f"expert{number}": str(folder / f"expert{number}") for number in range(experts)}
    merge = {"method": "task_arithmetic", "scale": 0.3}
    recipe = load_recipe({"base": str(folder / "base"), "experts": names, "merge": merge})
    plan = build_plan(recipe)
    slots = merged_parameters(recipe, plan, Learning(), ThreadPoolExecutor())
    coef_logits = {slot.key: torch.full((experts, 1), -0.85).requires_grad_() for slot in slots if slot.key}
    model = MergingModel(plan.config, slots, coef_logits, 0.3, dtype="float32", device="cpu")

    def step() -> None:
        _loss(model.forward(ids_1T, 0).logits, ids_1T).backward()

    return step


def _straightforward(folder: Path, experts: int, ids_1T: Any) -> Callable[[], None]:
    import torch
    from torch.func import functional_call
    from transformers import AutoModelForCausalLM

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)

    model = load("base").requires_grad_(False)
    base = dict(model.named_parameters())
    matrices = [name for name in base if "_proj" in name]
    tau = []
    for number in range(experts):
        expert = dict(load(f"expert{number}").named_parameters())
        tau.append({name: expert[name].detach() - base[name] for name in matrices})
    coef_logits = {name: torch.full((experts,), -0.85).requires_grad_() for name in matrices}

    def step() -> None:
        merged = dict(base)
        for name in matrices:
            c_E = torch.sigmoid(coef_logits[name])
            merged[name] = base[name] + sum(c_E[k] * tau[k][name] for k in range(experts))
        _loss(functional_call(model, merged, (ids_1T,), {"use_cache": False}).logits, ids_1T).backward()

    return step


def _report(found: list[dict[str, Any]], options: Any, console: Console) -> None:
    table = Table("experts", "case", "s a step", "x ordinary", "peak GB", box=SIMPLE_HEAD)
    lines = ["| experts | case | s a step, median (range) | x ordinary | peak memory, GB |", "|---|---|---|---|---|"]
    for experts in options.experts:
        rows = {case: [row for row in found if row["case"] == case and row["experts"] == experts] for case in CASES}
        usual = statistics.median(row["seconds"] for row in rows["ordinary"])
        for case, runs in rows.items():
            seconds = sorted(row["seconds"] for row in runs)
            median, peak = statistics.median(seconds), statistics.median(row["peak_bytes"] for row in runs) / 1e9
            span = f"{median:.2f} ({seconds[0]:.2f}-{seconds[-1]:.2f})"
            table.add_row(str(experts), case, span, f"{median / usual:.2f}", f"{peak:.2f}")
            lines.append(f"| {experts} | {case} | {span} | {median / usual:.2f} | {peak:.2f} |")
    console.print(table)
    data = {
        "shape": SHAPE,
        "tokens": options.tokens,
        "machine": facts(Path(tempfile.gettempdir()), len(os.sched_getaffinity(0))),
        "runs": found,
    }
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.results.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
    about = f"Random Llama-shaped models, {SHAPE}, bfloat16 on disk; one text of {options.tokens} tokens, float32 arithmetic."
    options.results.with_suffix(".md").write_text("\n".join(["# A step of learning", "", about, "", *lines]) + "\n")


if __name__ == "__main__":
    main()
