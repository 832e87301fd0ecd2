"""Whatever a problem claims is true."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.demonstration import arithmetic

EQUALITY = re.compile(r"[\d =+*/-]*=[\d =+*/-]*")


def value(expression: str) -> Fraction:
    return Fraction(eval(re.sub(r"\d+", lambda match: f"Fraction({match[0]})", expression), {"Fraction": Fraction}))


@pytest.mark.parametrize("kind", arithmetic.KINDS, ids=lambda kind: kind.__name__)
@given(seed=st.integers(0, 2**32))
def test_equalities_hold(kind: Callable[[Random], str], seed: int) -> None:
    text = kind(Random(seed))
    equalities = [match[0].strip() for match in EQUALITY.finditer(text)]
    closed = [equality.split(" = ") for equality in equalities if equality[0].isdigit()]  # the others have an unknown
    for sides in closed:
        assert len({value(side) for side in sides}) == 1, (sides, text)
    assert closed or kind is arithmetic.equation, text
    assert re.search(r"\nAnswer: .*\d", text)


@given(seed=st.integers(0, 2**32))
def test_the_answer_solves_the_equation(seed: int) -> None:
    text = arithmetic.equation(Random(seed))
    factor, unknown, offset, right = re.match(r"Solve (\d+)(\w) \+ (\d+) = (\d+)", text).groups()  # type: ignore[union-attr]
    root = int(text.rsplit(f"{unknown} = ", 1)[1])
    assert int(factor) * root + int(offset) == int(right)


@given(seed=st.integers(0, 2**32))
def test_money_given_back_is_what_was_paid_too_much(seed: int) -> None:
    text = arithmetic.shopping(Random(seed))
    count, price, paid = map(int, re.findall(r"\d+", text)[:3])
    assert int(text.rsplit(": ", 1)[1]) == paid - count * price >= 0


def test_no_problem_comes_twice() -> None:
    drawn = list(islice(arithmetic.problems(Random(0)), 3000))
    assert len(set(drawn)) == 3000
