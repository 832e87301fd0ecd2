"""What is taken for an answer, and when it is right: by hand, and on the real benchmarks' own solutions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moerge.evaluation import answers
from moerge.evaluation.benchmarks import BENCHMARKS
from moerge.evaluation.data import load_questions

NUMBERS = [
    ("There are 3 and 4. The answer is 7.", "7"),
    ("The answer is $1,234.50.", "1234.50"),
    ("So the answer is **-5**, not 12 as one might think: 9", "-5"),
    ("10 - 14 = -4\n#### -4", "-4"),
    ("The answer is 4. The answer is 9", "9"),
    ("She pays 2 * 3 = 6 dollars", "6"),
    ("It costs $ 18", "18"),
    ("Room B12 has 3.25 chairs ...", "3.25"),
    ("2, 3 and 5", "5"),
    ("it is .5", ".5"),
    ("none", ""),
    ("", ""),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_last_number(text: str, number: str) -> None:
    assert answers.last_number(text) == number


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("The answer is 1500.", True),
        ("The answer is $1,500.00.", True),
        ("The answer is 15.", False),
        ("The answer is 1500 or 1501: the answer is 1501", False),
        ("The answer is", False),
        ("", False),
    ],
)
def test_gsm8k(response: str, correct: bool) -> None:
    assert answers.gsm8k({"answer": "1000 + 500 = <<1000+500=1500>>1500\n#### 1,500"}, response).correct is correct


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (r"so $\boxed{3}$, or rather $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"$\fbox{4}$", "4"),
        (r"$\boxed 5$ is it", "5"),
        (r"$\boxed{ 6 }$", "6"),
        (r"$\boxed{7", ""),
        ("8", ""),
    ],
)
def test_boxed(text: str, expression: str) -> None:
    assert answers.boxed(text) == expression


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("Final Answer: The final answer is $\\frac12$. I hope it is correct.", True),
        ("It is $\\boxed{1/2}$.", True),
        ("It is $\\boxed{0.5}$.", True),
        ("First $\\boxed{3}$. The final answer is $\\dfrac{1}{2}$.", True),
        ("The final answer is $\\boxed{\\frac{1}{2}}$.", True),
        ("The final answer is $\\frac{1}{3}$. I hope it is correct. $\\boxed{\\frac{1}{2}}$", False),
        ("It is \\frac{1}{2}", False),
        ("", False),
    ],
)
def test_math(response: str, correct: bool) -> None:
    pytest.importorskip("lm_eval", reason="needs moerge[eval]")
    assert answers.math({"solution": "So it is $\\boxed{\\frac{1}{2}}$."}, response).correct is correct


@pytest.mark.parametrize(
    ("response", "accepted", "correct"),
    [
        (" the Eiffel-Tower.\nQ: and then?", ["Eiffel Tower"], False),
        (" The Eiffel Tower.\n", ["Eiffel tower"], True),
        ("St. Louis, Missouri", ["Saint Louis", "st louis missouri"], True),
        ("paris", ["London", "PARIS"], True),
        ("Paris, France", ["Paris"], False),
        ("an apple", ["apple"], True),
        ("Theatre", ["atre"], False),
        ("!!!", ["!!!"], True),
        ("the the", ["The The"], True),
        ("the", ["The The"], False),
        ("", ["!!!", "The", "a"], False),
        ("?", ["!!!"], False),
    ],
)
def test_question(response: str, accepted: list[str], correct: bool) -> None:
    assert answers.question({"answers": accepted}, response).correct is correct


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("def f():\r\n    return 1", "def f():\n    return 1"),
        ("def f():\n    return 1\n\nThis returns one.\n", "def f():\n    return 1\n"),
        ("Sure:\n```python\ndef f():\n    return 1\n```\nand so on", "def f():\n    return 1"),
        ("```\nx = 1", "x = 1"),
        ("This is no code at all", ""),
        ("import re\nre.match('\\w', 'a')", "import re\nre.match('\\w', 'a')"),
        ("", ""),
    ],
)
def test_python_code(response: str, code: str) -> None:
    assert answers.python_code(response) == code


MBPP = {"test_setup_code": "import math", "test_list": ["assert f() == math.floor(1.5)"]}


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("def f():\n    return 1", ""),
        ("def f():\n    return 2", "AssertionError: "),
        ("import sys\ndef f():\n    return 1\nsys.exit(0)", "SystemExit: 0"),
        ("def g():\n    return 1", "NameError: name 'f' is not defined"),
        ("", "no code"),
    ],
)
def test_mbpp(response: str, reason: str) -> None:
    verdict = answers.mbpp(MBPP, response)
    assert (verdict.correct, verdict.reason) == (not reason, reason)


def test_humaneval() -> None:
    document = {"prompt": "def f():\n", "test": "def check(candidate):\n    assert candidate() == 1", "entry_point": "f"}
    assert answers.humaneval(document, "    return 1").correct
    assert not answers.humaneval(document, "    return 0").correct
    assert not answers.humaneval(document, "").correct


SOLUTIONS: dict[str, Any] = {
    "gsm8k": lambda row: row["answer"],
    "math": lambda row: row["solution"],
    "nq": lambda row: row["answers"][-1],
    "triviaqa": lambda row: row["answers"][-1],
}
COUNTS = {"gsm8k": (1319, 15), "math": (5000, 40), "nq": (3610, 1), "triviaqa": (11313, 2)}
"""Questions, and those whose neighbour happens to have the same answer."""


@pytest.mark.parametrize("name", SOLUTIONS)
def test_every_real_solution_is_right_and_others_are_wrong(name: str, bench: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs moerge[eval]")
    pytest.importorskip("zstandard", reason="needs moerge[eval]")
    rows, judge, solution = load_questions(BENCHMARKS[name], bench).rows, BENCHMARKS[name].judge, SOLUTIONS[name]
    assert [row for row in rows if not judge(row, solution(row)).correct] == []
    assert [row for row in rows if judge(row, "").correct] == []
    neighbours = zip(rows, rows[1:] + rows[:1], strict=True)
    right_by_chance = sum(judge(row, solution(neighbour)).correct for row, neighbour in neighbours)
    assert (len(rows), right_by_chance) == COUNTS[name]


@pytest.mark.parametrize(("name", "solution", "step"), [("mbpp", "code", 40), ("humaneval", "canonical_solution", 12)])
def test_real_programs_pass_and_broken_ones_fail(name: str, solution: str, step: int, bench: Path) -> None:
    pytest.importorskip("zstandard", reason="needs moerge[eval]")
    rows, judge = load_questions(BENCHMARKS[name], bench).rows[::step], BENCHMARKS[name].judge
    for row in rows:
        assert judge(row, row[solution]).correct
        assert not judge(row, row[solution].replace("return", "return not")).correct
