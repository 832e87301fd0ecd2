"""The six benchmarks as text: a prompt and the reference solution, whose log-likelihood counts.

Greedy accuracy of a model of this size is at the floor of most of them; how likely it finds the right solution is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from moerge.evaluation.likelihood import document_losses
from moerge.runtime.loading import load

from .measuring import Documents
from .settings import Budget

SHOTS = 5
WINDOW = 2_048
Pair = tuple[str, str]
"""A prompt without white space at its end, and what follows, which begins with white space."""


def _code(row: dict[str, Any]) -> Pair:
    tests = "\n".join(row["test_list"])
    return f'"""\n{row["text"]}\n{tests}\n"""', "\n" + row["code"].replace("\r\n", "\n").strip()


def _short(row: dict[str, Any]) -> Pair:
    return f"Question: {row['question']}\nAnswer:", f" {row['answer'][0]}"


BENCHMARKS: dict[str, tuple[str, Callable[[dict[str, Any]], Pair]]] = {
    "MBPP": ("mbpp/mbpp", _code),
    "HumanEval": ("humaneval/test", lambda row: (row["prompt"].rstrip(), "\n" + row["canonical_solution"].rstrip())),
    "MATH": ("math/test", lambda row: (f"Problem: {row['problem']}\nSolution:", f" {row['solution']}")),
    "GSM8K": ("gsm8k/test", lambda row: (f"Question: {row['question']}\nAnswer:", f" {row['answer']}")),
    "NQ": ("nq_open/validation", _short),
    "TriviaQA": ("triviaqa/validation", _short),
}
"""File and form of each; questions with short answers come after five examples."""


def pairs(bench: Path, name: str, count: int) -> list[Pair]:
    """Prompts and solutions of the first questions."""
    file, form = BENCHMARKS[name]
    found = [form(row) for row in islice(_rows(bench / f"{file}.jsonl.zst"), count)]
    if form is not _short:
        return found
    examples = [form(row) for row in islice(_rows(bench / file.split("/")[0] / "train_subset.jsonl.zst"), SHOTS)]
    shots = "\n\n".join(prompt + answer for prompt, answer in examples)
    return [(f"{shots}\n\n{prompt}", answer) for prompt, answer in found]


def measure(bench: Path, budget: Budget, checkpoint: Path) -> Documents:
    """Nats, tokens and bytes of each reference solution; what routes sequences routes by the prompt."""
    loaded = load(checkpoint, dtype=budget.dtype, device=budget.device)
    return {
        name: [
            [loss.nats, loss.tokens, loss.bytes]
            for prompt, solution in pairs(bench, name, budget.questions)
            for loss in document_losses(loaded, [prompt + solution], window=WINDOW, given=len(prompt))
        ]
        for name in BENCHMARKS
    }


def write_prompts(bench: Path, folder: Path, count: int) -> dict[str, str]:
    """The prompts as files that `moerge route` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in BENCHMARKS:
        lines = [json.dumps({"text": prompt}) + "\n" for prompt, _ in pairs(bench, name, count)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: str(folder / f"{name}.jsonl") for name in BENCHMARKS}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    import zstandard

    with zstandard.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
