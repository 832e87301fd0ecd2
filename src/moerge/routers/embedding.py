"""Gates from token embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from moerge.architecture import family_of
from moerge.checkpoint.reader import open_folder
from moerge.errors import InputError
from moerge.extras import require
from moerge.operations.fitter import FitContext
from moerge.routers.base import FittedRouter, Temperature
from moerge.routers.calibrated import gates_by_name
from moerge.routers.prompts import Prompts, prompt_texts
from moerge.routers.regression import normalize_gate
from moerge.runtime.loading import load_tokenizer
from moerge.tensors.codec import decode
from moerge.tensors.tensor import Tensor
from moerge.texts import Document, TextRequest, Texts, render

if TYPE_CHECKING:
    from collections.abc import Sequence


class EmbeddingRouter(FittedRouter):
    """Row i of every gate is the sum of the token embeddings of expert i's prompts, of unit norm: mergekit-moe's `cheap_embed`.

    With negative prompts their sum, of unit norm too, is subtracted first. It reads only the embeddings of the prompts' tokens
    and runs no model; but routers see hidden states, not embeddings, so from the second layer on it is little more than a guess.
    Logits are divided by `temperature`.
    """

    kind: ClassVar[str] = "embedding"
    prompts: dict[str, Prompts]
    temperature: Temperature = 1.0

    def require(self) -> None:
        """The tokenizer is transformers'."""
        require("models", f"the {self.kind} router")

    def inputs(self, request: TextRequest) -> tuple[Texts, ...]:
        """The prompts."""
        return prompt_texts(self.prompts, request.experts, request.source)

    def fit(self, context: FitContext) -> dict[str, np.ndarray]:
        """One gate, for every layer."""
        tokenizer = load_tokenizer(context.folder)
        embedding = self._embedding(context)
        rows = []
        for name in context.experts:
            rows.append(self._row(tokenizer, embedding, self.prompts[name]))
            context.advance(len(context.texts[name].documents))
        rows_EH = np.stack(rows)
        gate_EH = normalize_gate(rows_EH, "columns", self.temperature)
        return gates_by_name(context, lambda layer: gate_EH)

    def _embedding(self, context: FitContext) -> Tensor:
        merged = open_folder(context.folder, name="merged")
        family = family_of(merged.config)
        assert family is not None
        return next(tensor for name, tensor in merged.tensors.items() if family.role_of(name) == "embedding")

    def _row(self, tokenizer: Any, embedding: Tensor, prompts: Prompts) -> np.ndarray:
        positive, negative = prompts.documents[: len(prompts.positive)], prompts.documents[len(prompts.positive) :]
        row_H = _unit(_summed(tokenizer, embedding, positive))
        return row_H - _unit(_summed(tokenizer, embedding, negative)) if negative else row_H


def _summed(tokenizer: Any, embedding: Tensor, texts: Sequence[Document]) -> np.ndarray:
    """The sum of the embeddings of all tokens, as float64 [H]."""
    rows, hidden = embedding.shape
    elements, total_H = embedding.open(), np.zeros(hidden)
    stored_H, row_H = np.empty(hidden, embedding.dtype.storage), np.empty(hidden, np.float32)
    for document in texts:
        text = (tokenizer.bos_token or "") + document if isinstance(document, str) else render(tokenizer, document)
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            if token >= rows:
                raise InputError(f"moe.router.prompts: token {token} has no embedding: the tokenizer and the model do not fit")
            decode(elements.read(token * hidden, stored_H), embedding.dtype, row_H)
            total_H += row_H
    return total_H


def _unit(values_H: np.ndarray) -> np.ndarray:
    return values_H / max(float(np.linalg.norm(values_H)), 1e-8)
