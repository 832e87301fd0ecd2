"""Answers in responses, and their correctness: pure functions, a benchmark's document and the response in, a verdict out.

Documents have one shape each, wherever they come from (see data.py).
"""

from __future__ import annotations

import ast
import re
import string
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

from moerge.evaluation.sandbox import run_program

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """The verdict on a response: its correctness, the text taken for its answer ("" if none), and the reason where that says
    more.
    """

    correct: bool
    answer: str
    reason: str = ""


_NUMBER = r"-?\$?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"(?:####|[Aa]nswer(?:\s+is)?)[^\d\n.$-]{{0,12}}({_NUMBER})")
_ANY = re.compile(rf"(?<![\w.]){_NUMBER}")


def last_number(text: str) -> str:
    """The number of GSM8K's answer: after the last "The answer is" or "####", else the last number there is; "" if none."""
    found = _MARKED.findall(text) or _ANY.findall(text)
    return found[-1].replace("$", "").replace(",", "") if found else ""


def gsm8k(document: Document, response: str) -> Verdict:
    """The numbers are equal, whatever their thousands separators, dollar signs and zeros behind the point."""
    answer, reference = last_number(response), last_number(document["answer"])
    return Verdict(_as_number(answer) is not None and _as_number(answer) == _as_number(reference), answer)


def _as_number(text: str) -> Decimal | None:
    try:
        return Decimal(text)
    except InvalidOperation:
        return None


_FINAL = re.compile(r"[Ff]inal answer is:?\s*\$(.+?)\$(?:\.|\s|$)", re.DOTALL)


def final_expression(text: str) -> str:
    r"""The expression of MATH's answer: after Minerva's "The final answer is", else in the last \boxed{}; "" if none."""
    final = _FINAL.findall(text)
    return (boxed(final[-1]) or final[-1]).strip() if final else boxed(text)


def boxed(text: str) -> str:
    r"""Return the content of the last \boxed{} or \fbox{}, braces balanced; "" if there is none."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return ""
    rest = re.sub(r"^\\(?:boxed|fbox)\s*", "", text[start:])
    if not rest.startswith("{"):  # \boxed 2
        return rest.split("$")[0].strip()
    depth = 0
    for index, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:index].strip()
    return ""


def math(document: Document, response: str) -> Verdict:
    """The expressions are the same once written in one way: the harness's `is_equiv`, which is Hendrycks et al.'s (2021)."""
    from lm_eval.tasks.hendrycks_math.utils import is_equiv

    answer, reference = final_expression(response), boxed(document["solution"])
    return Verdict(bool(answer) and bool(is_equiv(answer, reference)), answer)


_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”´`")


def normalized(text: str) -> str:
    """SQuAD's and TriviaQA's normal form: lower case, no punctuation, no articles, single spaces.

    Of a text that holds nothing else ("The The", "!!!") only case and spaces are changed: an empty answer must equal nothing.
    """
    lower = text.lower().replace("_", " ")
    return " ".join(_ARTICLES.sub(" ", lower.translate(_PUNCTUATION)).split()) or " ".join(lower.split())


def question(document: Document, response: str) -> Verdict:
    """The response's first line is one of the accepted answers, both in normal form."""
    lines = response.strip().splitlines()
    answer = lines[0].strip() if lines else ""
    accepted = {normalized(alias) for alias in document["answers"]} - {""}
    return Verdict(normalized(answer) in accepted, answer)


def humaneval(document: Document, response: str) -> Verdict:
    """The function that the response completes passes the problem's checks."""
    program = "\n".join([document["prompt"] + response, document["test"], f"check({document['entry_point']})"])
    return _judge(program, response)


def mbpp(document: Document, response: str) -> Verdict:
    """The code in the response passes the problem's asserts."""
    code = python_code(response)
    return _judge("\n".join([code, document["test_setup_code"], *document["test_list"]]), code)


def _judge(program: str, code: str) -> Verdict:
    if not code.strip():
        return Verdict(False, "", "no code")
    outcome = run_program(program)
    return Verdict(outcome.passed, code, outcome.reason)


def python_code(response: str) -> str:
    """The code of a response: its first fenced block if there is one, of that as many lines as are Python together.

    A model that is shown no example does not know when to end, and what it writes after its function is not code.
    """
    fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", response, re.DOTALL)
    lines = (fenced[1] if fenced else response).replace("\r\n", "\n").split("\n")
    for count in range(len(lines), 0, -1):
        code = "\n".join(lines[:count])
        if _is_python(code):
            return code
    return ""


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # about escape sequences, which the program's author got wrong, not the user
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def aliases(answers: Sequence[str]) -> list[str]:
    """Accepted answers without repetition, in order."""
    return list(dict.fromkeys(answer for answer in answers if answer.strip()))
