"""The demo's four corpora: general prose, math, code and knowledge.

All of it is in every Python installation or is generated, so the demo needs no download. Training and held-out text
are disjoint by document: by chapter and module for prose and code, by problem for math, by phrasing for knowledge.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeVar

from moerge.demonstration import arithmetic, stdlib
from moerge.demonstration.world import make_world

T = TypeVar("T")

DOMAINS = ("general", "math", "code", "knowledge")
TRAIN_CHARACTERS = {"general": 1_300_000, "math": 500_000, "code": 900_000, "knowledge": 400_000}
HELDOUT_CHARACTERS = 30_000
"""Of each domain but knowledge, whose held-out text is every fact once: about half as much."""


@dataclass(frozen=True)
class Corpus:
    """The documents of one domain; none is in both parts."""

    train: list[str]
    heldout: list[str]


def make_corpora(seed: int = 0, *, scale: float = 1.0) -> dict[str, Corpus]:
    """The corpus of each of `DOMAINS`, a pure function of the arguments and of the Python version.

    `scale` multiplies their sizes. Raises MachineError where Python was installed without the source of its library.
    """
    limit = {domain: int(scale * characters) for domain, characters in TRAIN_CHARACTERS.items()}
    heldout = int(scale * HELDOUT_CHARACTERS)
    general, code = _general_and_code(Random(f"{seed} stdlib"), limit["general"], limit["code"], heldout)
    return {
        "general": general,
        "math": _math(Random(f"{seed} math"), limit["math"], heldout),
        "code": code,
        "knowledge": _knowledge(Random(f"{seed} knowledge"), limit["knowledge"]),
    }


def write_corpora(corpora: dict[str, Corpus], folder: Path) -> None:
    """Write `folder/<domain>/{train,heldout}.jsonl`, one `{"text": ...}` per document."""
    for domain, corpus in corpora.items():
        (folder / domain).mkdir(parents=True, exist_ok=True)
        for part, documents in (("train", corpus.train), ("heldout", corpus.heldout)):
            lines = (json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents)
            (folder / domain / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def _general_and_code(rng: Random, general_limit: int, code_limit: int, heldout_limit: int) -> tuple[Corpus, Corpus]:
    """A module is in the training part of both corpora or in the held-out part of both."""
    chapters = stdlib.topics()
    rng.shuffle(chapters)
    heldout_prose = _take(chapters, heldout_limit // 2)
    train_prose = chapters[len(heldout_prose) :]
    modules = (module for module in stdlib.modules(rng) if len(module.prose) > 500 and len(module.code) > 1000)
    heldout = _take_by(modules, heldout_limit, size=lambda module: len(module.code))
    train = _take_by(modules, code_limit, size=lambda module: len(module.code))
    return (
        Corpus(
            train=_take(train_prose + [module.prose for module in train], general_limit),
            heldout=heldout_prose + [module.prose for module in heldout],
        ),
        Corpus(train=[module.code for module in train], heldout=[module.code for module in heldout]),
    )


def _math(rng: Random, limit: int, heldout_limit: int) -> Corpus:
    problems = arithmetic.problems(rng)
    heldout = _take(_grouped(problems), heldout_limit)
    return Corpus(_take(_grouped(problems), limit), heldout)


def _knowledge(rng: Random, limit: int) -> Corpus:
    world = make_world(rng)
    return Corpus(_take(world.train_documents(rng), limit), world.heldout_documents(rng))


def _grouped(problems: Iterator[str], size: int = 5) -> Iterator[str]:
    while True:
        yield "\n\n".join(islice(problems, size))


def _take(documents: Iterable[str], characters: int) -> list[str]:
    return _take_by(documents, characters, size=len)


def _take_by(documents: Iterable[T], limit: int, *, size: Callable[[T], int]) -> list[T]:
    """Documents from the front until their sizes reach `limit`; of an iterator the rest can be taken next."""
    taken, total = [], 0
    for document in documents:
        taken.append(document)
        total += size(document)
        if total >= limit:
            break
    return taken
