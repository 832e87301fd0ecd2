"""`moerge try` as a function: several merges side by side, none of them written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from moerge.errors import InputError
from moerge.evaluation.texts import read_texts
from moerge.extras import require
from moerge.inference.generation import generate
from moerge.merging.running import RunningMerge
from moerge.progress import Progress, reporter
from moerge.results import Data, Result
from moerge.searching.objectives import BitsPerByte, Over, summed
from moerge.searching.result import shown
from moerge.searching.settings import Choice, load_search
from moerge.searching.space import check_values, read_space

_MOST = 100
"""Merges of one sweep."""


class Tried(Data):
    """One merge: its continuation of each prompt, and bits per byte of each text."""

    point: dict[str, Any]
    continuations: dict[str, str] = {}
    bits_per_byte: dict[str, float] = {}
    merged: int = 0


class Sweep(Result):
    """Merges side by side."""

    recipe: str
    merges: list[Tried]

    def headline(self) -> str:
        """The number of merges, and the best."""
        scored = [(sum(merge.bits_per_byte.values()), shown(merge.point)) for merge in self.merges if merge.bits_per_byte]
        return f"{len(self.merges)} merges of {self.recipe}" + (f", fewest bits per byte at {min(scored)[1]}" if scored else "")


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    """A path and its values of `merge.scale=0.2:1:5` (five from 0.2 to 1) or `merge.method=ties,dare`."""
    path, equals, values = text.partition("=")
    if not equals or not path or not values:
        raise InputError(f"--sweep {text!r}: should be PATH=FROM:TO:NUMBER or PATH=A,B,C, such as merge.scale=0.2:1:5")
    ends = values.split(":")
    if len(ends) == 1:
        return path, [_parsed(text, value) for value in values.split(",")]
    try:
        least, greatest, number = float(ends[0]), float(ends[1]), int(ends[2])
    except (ValueError, IndexError):
        raise InputError(f"--sweep {text!r}: should be PATH=FROM:TO:NUMBER, such as merge.scale=0.2:1:5") from None
    if not 2 <= number <= _MOST:
        raise InputError(f"--sweep {text!r}: takes from 2 to {_MOST} values, not {number}")
    return path, [round(least + (greatest - least) * index / (number - 1), 6) for index in range(number)]


def _parsed(text: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--sweep {text!r}: {value!r} is no value") from None


def try_merges(
    recipe: str | Path | Mapping[str, Any],
    *,
    sweep: Mapping[str, Sequence[Any]],
    prompts: Sequence[str] = (),
    texts: Mapping[str, str] | None = None,
    documents: int = 16,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Sweep:
    """Merge a recipe with several values of its keys in memory, continue prompts and measure text with each.

    Args:
        recipe: A recipe's file or the same structure as a dict.
        sweep: Values by dotted path, such as {"merge.scale": [0.3, 0.6]}; of several paths every combination.
        prompts: Texts to continue.
        texts: Files of text by domain, measured in bits per byte.
        documents: Documents of each text.
        max_new_tokens: The longest continuation.
        temperature: 0 for the likeliest token each time.
        seed: For temperatures above 0.
        progress: A `Progress`, or True for a display on standard error.

    Returns:
        Continuations and figures of each merge.

    Raises:
        InputError: The recipe, a path into it, a value or a text is at fault.
    """
    require("models", "trying merges")
    places = dict(texts or {})
    if not prompts and not places:
        raise InputError("nothing to compare: give a --prompt, or text with --perplexity DOMAIN=FILE")
    file = load_search({
        "recipe": str(recipe) if isinstance(recipe, Path) else recipe,
        "search": {path: {"choice": list(values)} for path, values in sweep.items()},
        "objective": "bytes",
    })  # fmt: skip
    space = read_space(file)
    check_values(space, file.document.error)
    points = list(_points({path: kind for path, kind in space.kinds.items() if isinstance(kind, Choice)}))
    if len(points) > _MOST:
        raise InputError(f"{len(points)} merges are more than can be compared: name at most {_MOST}")
    heldout = {text.domain: text.documents for text in read_texts(places, limit=documents, given=space.given)}
    measure = BitsPerByte(tuple(heldout), Over("mean"), None, space.given)
    answer = partial(generate, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    running = RunningMerge()
    merges = []
    with reporter(progress) as report:
        advance = report.phase("merges", len(points), "steps")
        for point in points:
            plan = space.plan(point)
            loaded = running.load(plan, shown(point) or space.source)
            figures = {name: sums.figure for name, sums in summed(measure.rows(loaded, plan, heldout)).items()}
            answers = {prompt: answer(loaded, prompt).text for prompt in prompts}
            merges.append(Tried(point=point, continuations=answers, bits_per_byte=figures, merged=running.merged))
            advance(1)
    return Sweep(recipe=space.source, merges=merges)


def _points(kinds: Mapping[str, Choice]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*(kind.choice for kind in kinds.values())):
        yield dict(zip(kinds, values, strict=True))
