"""What passes between `run.py` and the clients' scripts, which run in environments of their own: NumPy is all that they share.

A case is a folder with the checkpoint `model/` and `case.json`; a client's answer is one JSON file.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

NEW_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A checkpoint and what to ask it: `prompts` are the token ids of `texts`, as transformers makes them."""

    folder: Path
    texts: list[str]
    prompts: list[list[int]]

    @property
    def model(self) -> Path:
        return self.folder / "model"


@dataclass(frozen=True)
class Answer:
    """For each of P prompts the probabilities of the next token (P, V), NEW_TOKENS greedy tokens, and the client's own token ids.

    `tokens` is None where the client takes ids only.
    """

    versions: str
    probabilities: list[list[float]]
    greedy: list[list[int]]
    tokens: list[list[int]] | None = None


def read_case(folder: Path) -> Case:
    stored = json.loads((folder / "case.json").read_text())
    return Case(folder, stored["texts"], stored["prompts"])


def answer(client: Callable[[Case, str], Answer]) -> None:
    """Run a client's script: SETTING OUT CASE... writes CASE/OUT.json, or why it failed into CASE/OUT.failed."""
    setting, out, *cases = sys.argv[1:]
    for folder in map(Path, cases):
        try:
            found = client(read_case(folder), setting)
        except Exception as error:
            traceback.print_exc()
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            (folder / f"{out}.failed").write_text(f"{type(error).__name__}: {said[0] if said else ''}")
        else:
            (folder / f"{out}.failed").unlink(missing_ok=True)
            (folder / f"{out}.json").write_text(json.dumps(asdict(found)))


def softmax(logits_PV: Any) -> list[list[float]]:
    """Probabilities in float64, whatever the logits are in."""
    logits_PV = np.asarray(logits_PV, np.float64)
    exponents = np.exp(logits_PV - logits_PV.max(-1, keepdims=True))
    return (exponents / exponents.sum(-1, keepdims=True)).tolist()


@dataclass(frozen=True)
class Comparison:
    """`difference` is the largest of probabilities; `first` the earliest greedy token that differs, None if none does."""

    difference: float
    first: int | None
    same_tokens: bool | None

    @property
    def agrees(self) -> bool:
        return self.first is None and self.same_tokens is not False


def compare(found: Answer, reference: Answer, prompts: Sequence[Sequence[int]]) -> Comparison:
    """A client's answer against transformers'."""
    difference = np.abs(np.array(found.probabilities) - np.array(reference.probabilities)).max()
    assert all(len(tokens) == NEW_TOKENS for tokens in (*found.greedy, *reference.greedy))
    pairs = [list(zip(one, other, strict=True)) for one, other in zip(found.greedy, reference.greedy, strict=True)]
    differing = [index for pair in pairs for index, (one, other) in enumerate(pair) if one != other]
    same = None if found.tokens is None else found.tokens == [list(prompt) for prompt in prompts]
    return Comparison(float(difference), min(differing, default=None), same)
