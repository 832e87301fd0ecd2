"""The rows of one model's embedding that make up a token of another tokenizer, found by the token's text.

Shapes: V rows of the chosen tokenizer's model, P pieces in all.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.tokenizer.splitting import Splitter
from moerge.tokenizer.surfaces import ROLES, Tokens, is_byte_piece, read_tokens
from moerge.tokenizer.vocabulary import has_tokenizer, same_files

EXACT, COMPOSED, LEFT = 0, 1, 2
"""Kinds of rows: one token has the text; several have it together; none has."""


@dataclass(frozen=True, eq=False)
class TokenAlignment:
    """For each row of a chosen vocabulary the rows of a model's own table that it is made of.

    Row v is made of `rows_P[starts_V1[v] : starts_V1[v + 1]]`, in the order of its text: one row where `kinds_V[v]` is EXACT,
    none where it is LEFT. `tokens_V` marks the rows that are a token's; the others are padding. `doubled_V` marks EXACT ones
    whose row another token has a better claim to.
    """

    starts_V1: np.ndarray = field(repr=False)
    rows_P: np.ndarray = field(repr=False)
    kinds_V: np.ndarray = field(repr=False)
    tokens_V: np.ndarray = field(repr=False)
    doubled_V: np.ndarray = field(repr=False)

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """The shares of the chosen vocabulary's tokens that are exact, composed and left; they add up to 1."""
        kinds_T = self.kinds_V[self.tokens_V]
        counts = np.bincount(kinds_T, minlength=3).tolist()
        return {name: count / max(1, len(kinds_T)) for name, count in zip(("exact", "composed", "left"), counts, strict=True)}

    def for_head(self) -> TokenAlignment:
        """Return the alignment for a head: each source row is used at most once; duplicates become LEFT.

        Two tokens with one row would share its probability, and a model that ends its texts with one of them would end them
        with the other as often: `<s>` and `</s>` where the model has `<|endoftext|>` for both, or `<0x41>` and `A`.
        """
        kinds_V = np.where(self.doubled_V, np.uint8(LEFT), self.kinds_V)
        counts_V = np.diff(self.starts_V1)
        rows_P = self.rows_P[np.repeat(~self.doubled_V, counts_V)]
        none_V = np.zeros_like(self.doubled_V)
        return TokenAlignment(_starts(np.where(self.doubled_V, 0, counts_V)), rows_P, kinds_V, self.tokens_V, none_V)


def align_vocabulary(chosen: Checkpoint, own: Checkpoint, rows: int, own_rows: int) -> TokenAlignment:
    """Map each of the `rows` of a vocabulary, that of `chosen`, to rows of the table of `own`, which has `own_rows`.

    A token is EXACT where the model has one that stands for the same bytes, whatever its spelling (`Ġthe`, `▁the`; `<0x0A>`),
    or, for special tokens, has the same text or else the same role (bos, eos, unk, pad; of a token with several, what ends
    texts goes before what begins them; for a model that knows no bos that is the eos, which stands between its texts). It is
    COMPOSED of the tokens that the model's own tokenizer splits its bytes into, and LEFT where that cannot be done: special
    tokens without a counterpart, and rows that are no token's. Between tokenizers with the same tokens under the same ids every
    row that both have is EXACT. The paper (MergeME, section 3.2) takes "an arbitrary tokenizer from one expert" and does not
    say what becomes of the others' rows.

    Raises InputError if a tokenizer is missing or cannot be read, if the two have no token in common, and if there is something
    to compose and the tokenizers library is not installed.
    """
    if has_tokenizer(chosen.folder) and same_files(chosen.folder, own.folder):
        return _identity(rows, own_rows, read_tokens(chosen, rows))
    tokens, owned = read_tokens(chosen, rows), read_tokens(own, own_rows)
    if tokens.vocabulary.ids == owned.vocabulary.ids and tokens.vocabulary.spelling.kind == owned.vocabulary.spelling.kind:
        return _identity(rows, own_rows, tokens)
    found = {number: best for number in tokens.surfaces if (best := _counterpart(number, tokens, owned)) is not None}
    if not any(number not in tokens.special for number in found):
        raise InputError(
            f"the tokenizers of {chosen.name} and {own.name} have no token in common, so {own.name} cannot be mapped to the "
            f"tokens of {chosen.name}: choose another 'tokenizer', or leave one of them out",
            code="vocabularies-differ",
        )
    made: dict[int, Sequence[int]] = {number: (row,) for number, (_, row) in found.items()}
    lacking = [number for number in tokens.surfaces if number not in found and number not in tokens.special]
    if lacking:
        splitter = Splitter(own.name, own.folder, owned)
        made |= {number: pieces for number in lacking if (pieces := splitter.split(tokens.surfaces[number]))}
    doubled_V = np.zeros(rows, bool)
    taken: set[int] = set()
    for number, (_, row) in sorted(found.items(), key=lambda entry: (entry[1][0], entry[0])):
        doubled_V[number] = row in taken
        taken.add(row)
    return _pieces(rows, made, found.keys(), tokens, doubled_V)


def _counterpart(number: int, tokens: Tokens, owned: Tokens) -> tuple[int, int] | None:
    """The one row of a token that has a counterpart, after a rank that orders those with the same: the lower, the better."""
    text, surfaces = tokens.vocabulary.texts[number], tokens.surfaces[number]
    special = number in tokens.special
    ids, others = (owned.special_ids, owned.ordinary_ids) if special else (owned.ordinary_ids, owned.special_ids)
    spelled = owned.vocabulary.ids.get(text, -1) if tokens.vocabulary.spelling.kind == owned.vocabulary.spelling.kind else -1
    if spelled in owned.surfaces and (spelled in owned.special) == special:
        return 0, spelled
    row = _first(ids, surfaces)
    if row is not None:
        return 2 if is_byte_piece(text) else 1, row
    for rank, role in enumerate(ROLES):
        if tokens.roles.get(role) == number and (row := owned.role(role)) is not None:
            return 3 + rank, row
    row = _first(others, surfaces)
    return None if row is None else (3 + len(ROLES), row)


def _first(ids: Mapping[bytes, int], surfaces: Sequence[bytes]) -> int | None:
    return next((ids[surface] for surface in surfaces if surface in ids), None)


def _pieces(
    rows: int, made: Mapping[int, Sequence[int]], exact: Container[int], tokens: Tokens, doubled_V: np.ndarray
) -> TokenAlignment:
    counts_V = np.zeros(rows, np.int64)
    kinds_V = np.full(rows, LEFT, np.uint8)
    order = sorted(made)
    counts_V[order] = [len(made[number]) for number in order]
    kinds_V[order] = [EXACT if number in exact else COMPOSED for number in order]
    flat = [row for number in order for row in made[number]]
    return TokenAlignment(_starts(counts_V), np.array(flat, np.int32), kinds_V, _marked(rows, tokens), doubled_V)


def _identity(rows: int, own_rows: int, tokens: Tokens) -> TokenAlignment:
    numbers_V = np.arange(rows)
    had_V = numbers_V < own_rows
    kinds_V = np.where(had_V, EXACT, LEFT).astype(np.uint8)
    own = numbers_V[had_V].astype(np.int32)
    return TokenAlignment(_starts(had_V.astype(np.int64)), own, kinds_V, _marked(rows, tokens), np.zeros(rows, bool))


def _starts(counts_V: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts_V))).astype(np.int64)


def _marked(rows: int, tokens: Tokens) -> np.ndarray:
    tokens_V = np.zeros(rows, bool)
    tokens_V[list(tokens.surfaces)] = True
    return tokens_V
