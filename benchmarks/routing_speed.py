"""How fast a sequence-routed model answers, against the dense models that it would replace.

    python benchmarks/routing_speed.py --runs 5

Random weights in Llama's shape, float32, one prompt; greedy decoding with the cache. A model of four experts with separate
attention and feed-forward layers, routed by perplexity to K = 1 or 2 of them, against K separate dense models that run one
after another in the same process. Every round measures every case once, so that a disturbance hits all cases alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from machine import facts
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from moerge.demonstration.runtime import import_torch, settled

EXPERTS = ("base", "math", "code", "knowledge")
SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
WARM_UP = 4
"""Tokens generated in a round that is not counted."""


@dataclass(frozen=True)
class Timed:
    """Seconds until the first token, and of all tokens after it."""

    first: float
    rest: float


@dataclass(frozen=True)
class Case:
    """A way of answering, called with the number of tokens; `against` is the dense case to compare it with."""

    name: str
    against: str
    answer: Callable[[int], Timed]
    route: Callable[[], float] | None = None
    known: Callable[[], float] | None = None
    """Seconds until the first token where the routing is given."""
    runs: list[dict[str, float]] = field(default_factory=list)

    def measure(self, new: int) -> dict[str, float]:
        timed = self.answer(new)
        run = {"first_token_seconds": timed.first, "rest_seconds": timed.rest}
        if self.route is not None and self.known is not None:
            run |= {"routing_seconds": self.route(), "first_token_routing_known_seconds": self.known()}
        return run


class Clock:
    """A streamer that notes when each token comes; `generate` hands it the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "routing_speed.json")
    options = parser.parse_args()
    import_torch()
    import torch

    with settled(), torch.inference_mode():
        threads = torch.get_num_threads()
        found = cases(torch.randint(1, SHAPE["vocab_size"], (1, options.prompt)))
        for case in found:
            case.measure(WARM_UP)
        for _ in range(options.runs):
            for case in found:
                case.runs.append(case.measure(options.new))
            results = {
                "machine": {**facts(Path(), threads), "torch": torch.__version__},
                "shape": {**SHAPE, "experts": len(EXPERTS)},
                "prompt_tokens": options.prompt,
                "new_tokens": options.new,
                "cases": [summary(case, options.new) for case in found],
            }
            save(results, options.results)  # after every round, so that an interrupted run leaves what it has
    show(results)


def save(results: dict[str, Any], path: Path) -> None:
    """JSON, and Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")


def cases(prompt_BT: Any) -> list[Case]:
    """For each K: K dense models, and the sequence-routed model with both mixes on one residual stream or several."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = partial(LlamaConfig, **SHAPE, bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False)
    dense: list[Any] = [LlamaForCausalLM(config()).eval() for _ in range(2)]
    routed = _routed_model(config())
    found = []
    for count in (1, 2):
        against = "1 dense model" if count == 1 else f"{count} dense models in turn"
        found.append(Case(against, against, partial(_dense, dense[:count], prompt_BT)))
        for mix in ("layer", "output"):
            actions = (partial(action, routed, count, mix, prompt_BT) for action in (_answer, _route, _known))
            found.append(Case(f"K = {count}, mix {mix}", against, *actions))
    return found


def _routed_model(expert_config: Any) -> Any:
    from moerge.modeling import MoergeConfig, MoergeForCausalLM

    config = MoergeConfig(expert_config=expert_config, expert_names=list(EXPERTS), separate=["ffn", "attention"])
    return MoergeForCausalLM(config).eval()


def _dense(models: list[Any], prompt_BT: Any, new: int) -> Timed:
    timed = [_generate(model, prompt_BT, new) for model in models]
    return Timed(sum(t.first for t in timed), sum(t.rest for t in timed))


def _answer(model: Any, count: int, mix: str, prompt_BT: Any, new: int) -> Timed:
    _configure(model, count, mix)
    return _generate(model, prompt_BT, new)


def _route(model: Any, count: int, mix: str, prompt_BT: Any) -> float:
    _configure(model, count, mix)
    begun = time.perf_counter()
    model.route(prompt_BT)
    return time.perf_counter() - begun


def _known(model: Any, count: int, mix: str, prompt_BT: Any) -> float:
    _configure(model, count, mix)
    return _generate(model, prompt_BT, 1, routing=model.route(prompt_BT)).first


def _configure(model: Any, count: int, mix: str) -> None:
    model.set_routing("perplexity", top_k=count)
    model.config.mix = mix


def _generate(model: Any, prompt_BT: Any, new: int, **options: Any) -> Timed:
    clock, begun = Clock(), time.perf_counter()
    mask_BT = prompt_BT.new_ones(prompt_BT.shape)
    model.generate(prompt_BT, attention_mask=mask_BT, max_new_tokens=new, do_sample=False, streamer=clock, **options)
    _, first, *_ = clock.times
    assert len(clock.times) == new + 1
    return Timed(first - begun, clock.times[-1] - first)


def summary(case: Case, new: int) -> dict[str, Any]:
    """Medians over the runs, and the runs."""
    found = {key: statistics.median(run[key] for run in case.runs) for key in case.runs[0]}
    found["tokens_per_second"] = (new - 1) / found.pop("rest_seconds")
    found["answer_seconds"] = statistics.median(run["first_token_seconds"] + run["rest_seconds"] for run in case.runs)
    return {"case": case.name, "against": case.against, **found, "runs": case.runs}


def tables(results: dict[str, Any]) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Title, columns and rows."""
    by_name = {case["case"]: case for case in results["cases"]}
    speed, routing = [], []
    for case in results["cases"]:
        dense = by_name[case["against"]]
        first, rate, answer = (case[key] for key in ("first_token_seconds", "tokens_per_second", "answer_seconds"))
        speed.append(
            (
                case["case"],
                *(f"{first * 1e3:.0f}", f"{first / dense['first_token_seconds']:.2f}"),
                *(f"{rate:.1f}", f"{rate / dense['tokens_per_second']:.2f}"),
                *(f"{answer:.2f}", f"{answer / dense['answer_seconds']:.2f}"),
            )
        )
        if "routing_seconds" in case:
            seconds, known = case["routing_seconds"], case["first_token_routing_known_seconds"]
            shares = f"{seconds / first:.0%}", f"{seconds / answer:.0%}"
            routing.append((case["case"], f"{seconds * 1e3:.0f}", *shares, f"{known * 1e3:.0f}"))
    ratio = "/ K dense"
    return [
        ("Answering", ("case", "first token, ms", ratio, "tokens/s after it", ratio, "whole answer, s", ratio), speed),
        ("The routing pass", ("case", "ms", "of first token", "of answer", "first token if the routing is given, ms"), routing),
    ]


def show(results: dict[str, Any]) -> None:
    for title, columns, rows in tables(results):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*row)
        Console(width=120).print(table)


def markdown(results: dict[str, Any]) -> str:
    shape = ", ".join(f"{key} {value}" for key, value in results["shape"].items())
    lines = [
        "# Speed of a sequence-routed model",
        "",
        ", ".join(f"{key} {value}" for key, value in results["machine"].items()) + ".",
        "",
        f"Random weights, float32, {shape}; a prompt of {results['prompt_tokens']} tokens, {results['new_tokens']} new ones, "
        f"median of {len(results['cases'][0]['runs'])} runs.",
    ]
    for title, columns, rows in tables(results):
        lines += ["", f"## {title}", "", "| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
