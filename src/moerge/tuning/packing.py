"""Documents as sequences of one length: texts run on from one into the next, answers of conversations stay whole.

Each token has a mark. Shapes: N tokens, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moerge.texts import Conversation, Document, encode_answers

LEARNED, CONTEXT, PADDING = 0, 1, 2
"""Marks: what is learned, what is only read, and what fills a sequence behind the last conversation that fits into it."""


@dataclass
class Packer:
    """Cuts documents into sequences of `length` tokens.

    A text ends with the tokenizer's end-of-text token and runs on wherever a sequence ends. A conversation begins a new sequence
    where it does not fit into what is left of one; of one that is longer than a sequence, those answers are `left_out` that end
    behind it, and so are the turns between them. `learned` counts tokens.
    """

    tokenizer: Any
    length: int
    tokens: int = 0
    learned: int = 0
    left_out: int = 0
    marked: bool = False
    _open: bool = field(default=False, init=False)

    def pieces(self, documents: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The documents' tokens, uint32 [N], and their marks, uint8 [N]; what was left out gives none."""
        texts = iter(self._texts([document for document in documents if isinstance(document, str)]))
        for document in documents:
            if isinstance(document, Conversation):
                yield from self._conversation(document)
            else:
                ids_N = next(texts)
                self._open = False
                yield self._add(ids_N, np.full(len(ids_N), LEARNED, np.uint8))

    def finish(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Padding of a last sequence that ends with a conversation; one that ends with a text is not used."""
        if self._open:
            yield from self._pad()

    def _texts(self, texts: list[str]) -> Iterator[np.ndarray]:
        end = self.tokenizer.eos_token_id
        for ids in self.tokenizer(texts)["input_ids"] if texts else ():
            yield np.array([*ids, *([end] if end is not None and ids[-1:] != [end] else [])], np.uint32)

    def _conversation(self, conversation: Conversation) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for encoded in encode_answers(self.tokenizer, conversation):
            answer_N = np.array(encoded.answers)
            ends = np.flatnonzero(answer_N & ~np.append(answer_N[1:], False)) + 1
            fitting = ends[ends <= self.length]
            self.left_out += len(ends) - len(fitting)
            self.marked = True
            if not len(fitting):
                continue
            if fitting[-1] > self._room:
                yield from self._pad()
            self._open = True
            marks_N = np.where(answer_N[: fitting[-1]], LEARNED, CONTEXT).astype(np.uint8)
            yield self._add(np.array(encoded.ids[: fitting[-1]], np.uint32), marks_N)

    @property
    def _room(self) -> int:
        return self.length - self.tokens % self.length

    def _pad(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self._room == self.length:
            return
        settings = self.tokenizer
        token = next((one for one in (settings.pad_token_id, settings.eos_token_id) if one is not None), 0)
        yield self._add(np.full(self._room, token, np.uint32), np.full(self._room, PADDING, np.uint8))

    def _add(self, ids_N: np.ndarray, marks_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.tokens += len(ids_N)
        self.learned += int(np.count_nonzero(marks_N == LEARNED))
        return ids_N, marks_N
