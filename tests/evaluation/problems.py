"""A few made-up problems in the layout of the real benchmarks, with reference solutions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ADD = "def add(a, b):\n"
PROBLEMS: dict[str, list[dict[str, Any]]] = {
    "gsm8k/test": [
        {
            "question": "Ann has 1,200 nuts and eats 3. How many are left?",
            "answer": "1200 - 3 = <<1200-3=1197>>1197 nuts\n#### 1,197",
        },
        {"question": "It is 5 degrees and gets 9 colder. How warm is it?", "answer": "5 - 9 = <<5-9=-4>>-4 degrees\n#### -4"},
        {"question": "Two pens are $3 together. What is one?", "answer": "3 / 2 = <<3/2=1.5>>1.5\n#### 1.50"},
    ],
    "math/test": [
        {"problem": "What is $1/4+1/4$?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "Level 1", "type": "Prealgebra"},
        {"problem": "Solve $x^2=2$.", "solution": "So $x=\\boxed{\\pm\\sqrt{2}}$.", "level": "Level 1", "type": "Algebra"},
    ],
    "mbpp/mbpp": [
        {
            "task_id": number,
            "text": "Write a function to add two numbers.",
            "code": "def add(a, b):\r\n    return a + b",
            "test_setup_code": "",
            "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(-1, 1) == 0"],
        }
        for number in (1, 10, 11, 510, 511)
    ],
    "humaneval/test": [
        {
            "task_id": "HumanEval/0",
            "prompt": f'{ADD}    """ Add two numbers. """\n',
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        }
    ],
    "nq_open/validation": [{"question": "who wrote it", "answer": ["The Bard", "W. Shakespeare"]}],
    "nq_open/train": [
        {"question": "two ways to say it", "answer": ["one", "another"]},
        {"question": "a long one", "answer": ["this answer has too many words to show"]},
        *({"question": f"shot {number}", "answer": [f"answer {number}"]} for number in range(6)),
    ],
    "triviaqa/validation": [
        {"question": "Which band?", "answer": ["!!!"]},
        {"question": "Which town?", "answer": ["St. Louis, Missouri", "St Louis"]},
    ],
    "triviaqa/train_subset": [{"question": f"Shot {number}?", "answer": [f"Answer {number}"]} for number in range(5)],
}


def write_problems(folder: Path) -> Path:
    for name, rows in PROBLEMS.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


SOLUTIONS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "gsm8k": lambda document: f" {document['answer']}",
    "math": lambda document: f" {document['solution']}",
    "mbpp": lambda document: document["code"],
    "humaneval": lambda document: document["canonical_solution"],
    "nq": lambda document: f" {document['answers'][-1]}",
    "triviaqa": lambda document: f" {document['answers'][0]}",
}
