"""The weight of each token when something is fitted over the vocabulary. Shape: V tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moerge.errors import InputError
from moerge.extras import require
from moerge.runtime.tokens import encode_checked, load_tokenizer
from moerge.texts import TextRequest, Texts, read_texts

if TYPE_CHECKING:
    from moerge.operations.fitter import FitContext

TEXTS, LONGEST = 200, 4096
"""Documents of each expert that tokens are counted in, and how many tokens of each."""
SMOOTHING = 0.02
"""Share of the weight that all tokens have alike, also those that the text lacks."""


class TokenWeights:
    """Weights of the tokens for the projectors of an expert: how often they occur in its calibration text, smoothed.

    It is mostly text like its own that is sent to an expert. Where it has none, the text of all the others takes its place, in
    equal shares; without any text all tokens count alike.
    """

    def __init__(self) -> None:
        self._counts: dict[str, np.ndarray] | None = None
        self.have_text = False

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The text that the recipe has of these experts; none is needed."""
        named = {name: location for name, location in request.calibration.items() if name in request.experts}
        self.have_text = bool(named)
        return tuple(read_texts(name, named[name], relative_to=request.folder, limit=TEXTS) for name in named)

    def require(self) -> None:
        """InputError where there is text and nothing that runs a model over it."""
        if not self.have_text:
            return
        require("models", "fitting projectors to text")
        from moerge.modeling import register

        try:
            register()
        except ImportError as error:
            message = f"fitting projectors to calibration text: {error}: pip install --upgrade transformers"
            raise InputError(f"{message}, or remove 'calibration'") from None

    def of(self, context: FitContext, expert: str, tokens: int) -> np.ndarray:
        """float64 [V], adding up to 1, each above 0."""
        if self._counts is None:
            self._counts = _count(context, tokens)
        return smoothed(self._counts, expert, tokens)


def smoothed(counts: Mapping[str, np.ndarray], expert: str, tokens: int) -> np.ndarray:
    """The weights, from the counts [V] in each expert's text."""
    shares = {name: counts_V / counts_V.sum() for name, counts_V in counts.items() if counts_V.any()}
    if not shares:
        return np.full(tokens, 1 / tokens)
    every_V = np.sum(list(shares.values()), axis=0) / len(shares)
    weights_V: np.ndarray = (1 - SMOOTHING) * shares.get(expert, every_V) + SMOOTHING / tokens
    return weights_V


def _count(context: FitContext, tokens: int) -> dict[str, np.ndarray]:
    documents = {name: texts.documents[:TEXTS] for name, texts in context.texts.items() if texts.documents}
    if not documents:
        return {}
    tokenizer = load_tokenizer(context.folder)
    counts = {name: np.zeros(tokens) for name in documents}
    for name, texts in documents.items():
        for text in texts:
            counts[name] += np.bincount(encode_checked(tokenizer, text, LONGEST, tokens, name), minlength=tokens)
    return counts
