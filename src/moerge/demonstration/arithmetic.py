"""Arithmetic with its working written out: the text of the math expert.

Every problem is a function of a random generator that returns the finished problem, so that a new kind of problem is
one function in `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from random import Random

_NAMES = ("Ada", "Emmy", "Leon", "Carl", "Sofia", "Alan", "Grace", "Paul", "Hedy", "Noor")
_THINGS = ("apples", "books", "coins", "pens", "shells", "stamps", "marbles", "tickets", "cups", "cards")


def problems(rng: Random) -> Iterator[str]:
    """Problems without end, of all kinds in equal parts, no text twice."""
    seen: set[str] = set()
    while True:
        problem = rng.choice(KINDS)(rng)
        if problem not in seen:
            seen.add(problem)
            yield problem


def addition(rng: Random) -> str:
    """Columns from the right, with the carry."""
    left, right = rng.randint(11, 999), rng.randint(11, 999)
    steps, carry = [], 0
    for place in range(len(str(max(left, right)))):
        a, b = left // 10**place % 10, right // 10**place % 10
        total = a + b + carry
        steps.append(f"{a} + {b}" + (f" + {carry}" if carry else "") + f" = {total}")
        carry = total // 10
    return f"Add {left} + {right}.\n" + "; ".join(steps) + f".\nAnswer: {left + right}"


def subtraction(rng: Random) -> str:
    """Tens first, then ones."""
    left, right = sorted((rng.randint(30, 999), rng.randint(11, 99)), reverse=True)
    tens, ones = right // 10 * 10, right % 10
    return f"Subtract {left} - {right}.\n{left} - {tens} = {left - tens}; {left - tens} - {ones} = {left - right}.\n" + (
        f"Answer: {left - right}"
    )


def multiplication(rng: Random) -> str:
    """The distributive law."""
    left, right = rng.randint(11, 99), rng.randint(3, 9)
    tens, ones = left // 10 * 10, left % 10
    return (
        f"Multiply {left} * {right}.\n{left} * {right} = {tens} * {right} + {ones} * {right} = "
        f"{tens * right} + {ones * right} = {left * right}.\nAnswer: {left * right}"
    )


def division(rng: Random) -> str:
    """Whole quotient and remainder, checked."""
    divisor, quotient = rng.randint(3, 12), rng.randint(3, 20)
    remainder = rng.randrange(divisor)
    dividend = divisor * quotient + remainder
    return (
        f"Divide {dividend} by {divisor}.\n{divisor} * {quotient} = {divisor * quotient}; "
        f"{dividend} - {divisor * quotient} = {remainder}.\nAnswer: {quotient} remainder {remainder}"
    )


def equation(rng: Random) -> str:
    """A linear equation in one unknown, solved step by step."""
    factor, root, offset = rng.randint(2, 12), rng.randint(1, 20), rng.randint(1, 50)
    unknown = rng.choice("xyzn")
    right = factor * root + offset
    return (
        f"Solve {factor}{unknown} + {offset} = {right}.\nSubtract {offset} from both sides: "
        f"{factor}{unknown} = {right - offset}.\nDivide both sides by {factor}: {unknown} = {root}.\n"
        f"Answer: {unknown} = {root}"
    )


def sharing(rng: Random) -> str:
    """A word problem: groups of things, some given away."""
    name, friend = rng.sample(_NAMES, 2)
    thing, boxes, each = rng.choice(_THINGS), rng.randint(2, 12), rng.randint(3, 15)
    given = rng.randint(1, boxes * each - 1)
    return (
        f"{name} has {boxes} boxes with {each} {thing} in each box. {name} gives {given} {thing} to {friend}. "
        f"How many {thing} does {name} have left?\nIn the boxes there are {boxes} * {each} = {boxes * each} {thing}. "
        f"After giving {given} away there are {boxes * each} - {given} = {boxes * each - given} {thing}.\n"
        f"Answer: {boxes * each - given}"
    )


def shopping(rng: Random) -> str:
    """A word problem: a price and the change."""
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    count, price = rng.randint(2, 9), rng.randint(2, 12)
    paid = -(-count * price // 50) * 50
    return (
        f"{name} buys {count} {thing} for {price} dollars each and pays with {paid} dollars. "
        f"How much change does {name} get?\nThe {thing} cost {count} * {price} = {count * price} dollars. "
        f"The change is {paid} - {count * price} = {paid - count * price} dollars.\nAnswer: {paid - count * price}"
    )


def fractions(rng: Random) -> str:
    """A sum of two fractions over their common denominator, reduced."""
    below, beside = rng.randint(2, 9), rng.randint(2, 9)
    above, over = rng.randint(1, below), rng.randint(1, beside)
    common, total = below * beside, Fraction(above, below) + Fraction(over, beside)
    return (
        f"Add the fractions {above}/{below} + {over}/{beside}.\nThe common denominator is {below} * {beside} = {common}. "
        f"{above * beside}/{common} + {over * below}/{common} = {above * beside + over * below}/{common}.\nAnswer: {total}"
    )


def sequence(rng: Random) -> str:
    """The next term of an arithmetic sequence."""
    first, step = rng.randint(1, 60), rng.randint(2, 15)
    terms = [first + step * i for i in range(5)]
    return (
        f"Continue the sequence {', '.join(map(str, terms[:4]))}.\nEach term is {step} more than the one before: "
        f"{terms[3]} + {step} = {terms[4]}.\nAnswer: {terms[4]}"
    )


def percentage(rng: Random) -> str:
    """A percentage of a number by way of one percent."""
    percent, hundreds = rng.choice((5, 10, 15, 20, 25, 30, 40, 50, 60, 75)), rng.randint(1, 40)
    number = hundreds * 100
    return (
        f"Find {percent} percent of {number}.\nOne percent of {number} is {number} / 100 = {hundreds}. "
        f"{percent} * {hundreds} = {percent * hundreds}.\nAnswer: {percent * hundreds}"
    )


KINDS: tuple[Callable[[Random], str], ...] = (
    addition, subtraction, multiplication, division, equation, sharing, shopping, fractions, sequence, percentage,
)  # fmt: skip
