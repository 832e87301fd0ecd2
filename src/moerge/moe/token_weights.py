"""How much each token counts when something is fitted over the vocabulary. Shape: V tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moerge.calibration import Texts, read_texts
from moerge.errors import InputError
from moerge.moe.running import require_models_extra

if TYPE_CHECKING:
    from moerge.moe.context import FitContext
    from moerge.recipe.schema import Recipe

TEXTS, LONGEST, CHARACTERS = 200, 4096, 20
"""Documents of each expert that tokens are counted in, how many tokens of each, and characters a token has at most on average."""
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

    def inputs(self, recipe: Recipe, experts: Sequence[str]) -> tuple[Texts, ...]:
        """The text that the recipe has of these experts; none is needed."""
        named = {name: location for name, location in recipe.calibration.items() if name in experts}
        self.have_text = bool(named)
        return tuple(read_texts(name, named[name], relative_to=recipe.folder, limit=TEXTS) for name in named)

    def require(self) -> None:
        """InputError where there is text and nothing that runs a model over it."""
        if not self.have_text:
            return
        require_models_extra("fitting projectors to text")
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
            counts[name] += np.bincount(known_tokens(tokenizer, text, LONGEST, tokens, name), minlength=tokens)
    return counts


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder that may hold a model of our own architecture; no code in it is run."""
    from moerge.inference import loading
    from moerge.modeling import register

    with suppress(ImportError):  # an older transformers reads the tokenizer of all others
        register()
    return loading.load_tokenizer(folder)


def known_tokens(tokenizer: Any, text: str, limit: int, rows: int, expert: str) -> np.ndarray:
    """The first `limit` tokens of a text, int64; InputError for one beyond the embedding's rows."""
    some = text[: limit * CHARACTERS]
    ids = np.asarray(tokenizer(some, truncation=True, max_length=limit)["input_ids"], np.int64)
    if ids.size and ids.max() >= rows:
        raise InputError(f"calibration.{expert}: token {ids.max()} has no embedding: the tokenizer and the model do not fit")
    return ids
