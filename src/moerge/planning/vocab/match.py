"""Making one vocabulary of several: which tokens the result has, from which rows, and the files that say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.planning.models import SourceModel
from moerge.planning.vocab.alignment import Alignment, GivenRows, match_rows, own_rows, with_rows
from moerge.planning.vocab.chat import Chat, Move, settle_chat
from moerge.planning.vocab.checks import (
    check_kinds,
    check_roles,
    listed,
    no_tokenizers,
    not_readable,
    splitting_warnings,
    undecided,
)
from moerge.planning.vocab.config import with_special_ids
from moerge.planning.vocab.token_tensors import sizes_of, token_tensors
from moerge.recipe.schema import UNION, Recipe
from moerge.recipe.tokens import TokenRow
from moerge.tokenizer import (
    NewToken,
    Vocabulary,
    added_entry,
    by_position,
    companion_files,
    has_tokenizer,
    next_added_id,
    read_vocabulary,
    same_files,
    with_new_tokens,
)

_NO_TOKENIZER = "no model has a tokenizer: the merged checkpoint will have none either"
_GIVEN = ""
"""In place of the model that brings tokens: those that the recipe alone names."""
_FAR = 1_000_000
"""A token whose id lies further beyond the embedding than this is damage."""


@dataclass(frozen=True)
class ResolvedVocabulary:
    """The models as if all had the result's tokens, and what comes of that.

    `models` are those to merge; `source` is the model whose tokenizer, generation config and special tokens the result has.
    Without an `alignment` all vocabularies were the same to begin with. `facts` are for the manifest.
    """

    models: tuple[SourceModel, ...]
    source: str
    files: Mapping[str, bytes]
    alignment: Alignment | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def origin(self) -> str:
        """Say where tokenizer and generation config come from."""
        donor = self.facts.get("generation_config", self.source)
        apart = donor != self.source
        return (
            f"tokenizer from {self.source}, generation config from {donor}"
            if apart
            else f"tokenizer and generation config from {donor}"
        )

    def with_chat(self, chat: Chat) -> ResolvedVocabulary:
        """Return the vocabulary with a chat template, and the tokens that end an answer, in its files and configs."""
        own = {"chat_template": chat.template, "generation_config": chat.donor if chat.donor != self.source else None}
        facts = {**self.facts, **{key: value for key, value in own.items() if value}}
        notes = (*self.notes, *chat.notes)
        models = tuple(model.with_values(chat.ids) for model in self.models)
        return replace(self, models=models, files=chat.files, facts=facts, notes=notes)


def resolve_vocabulary(models: Sequence[SourceModel], recipe: Recipe, config_source: str) -> ResolvedVocabulary:
    """Resolve the recipe's `tokenizer`, from configs and tokenizer files alone.

    Raises InputError where vocabularies differ and the recipe does not say whose counts, and where they cannot be matched.
    """
    having = [model for model in models if has_tokenizer(model.folder)]
    source = _tokenizer_source(models, having, recipe, config_source)
    files = companion_files(next(model.folder for model in models if model.name == source))
    sizes = sizes_of(models)
    rows_change = bool(recipe.tokens or recipe.pad_to_multiple_of)
    if not having:
        if rows_change:
            raise InputError("tokenizer: no model has tokenizer files, which rows of tokens and padding need: add them")
        if _differ(sizes):
            raise no_tokenizers(sizes)
        lacking = (_NO_TOKENIZER,) if any(model.model_type for model in models) else ()
        return ResolvedVocabulary(tuple(models), source, files, warnings=lacking)
    without = [model.name for model in models if model not in having]
    warnings = [f"{', '.join(without)}: no tokenizer, assumed to be that of {having[0].name}"] if without else []
    check_roles(having, recipe.tokenizer)
    if _differ(sizes) or rows_change:
        token_tensors(models, sizes)  # so that they are the tensors' sizes, and not only the configs'
    vocabularies = _read(models, having, sizes, source, positions=not rows_change)
    same = _same_tokens(vocabularies, sizes)
    if same and not _differ(sizes) and not rows_change:
        warnings += splitting_warnings(vocabularies, source)
        settled = with_special_ids(models, source, config_source)
        alike = ResolvedVocabulary(settled, source, files, facts={"source": source}, warnings=tuple(warnings))
        return alike.with_chat(settle_chat(recipe, models, source, files, None))
    if not same:
        check_kinds(vocabularies, source)
        if recipe.tokenizer is None:
            raise undecided(vocabularies, source)
    matching = _VocabularyMatch(models, recipe, config_source, source, vocabularies, sizes)
    resolved, move = matching.resolve(files, warnings)
    return resolved.with_chat(settle_chat(recipe, models, source, resolved.files, move))


def _tokenizer_source(models: Sequence[SourceModel], having: Sequence[SourceModel], recipe: Recipe, config_source: str) -> str:
    """The model whose tokenizer the result has; for a union, that the others' tokens are added to."""
    names = [model.name for model in having]
    named = recipe.tokenizer
    if named is not None and named != UNION:
        if names and named not in names:
            raise InputError(f"tokenizer: {named} has no tokenizer files: name another model ({', '.join(names)})")
        return named
    first = models[0].name if named == UNION else config_source
    return first if first in names or not names else names[0]


def _read(
    models: Sequence[SourceModel], having: Sequence[SourceModel], sizes: Mapping[str, Any], source: str, *, positions: bool
) -> dict[str, Vocabulary]:
    """All vocabularies by model; those without have that of the first. What are the same files is read once, or by position
    where `positions` say enough.
    """
    first = having[0]
    found: dict[str, Vocabulary | None] = {}
    if all(same_files(first.folder, model.folder) for model in having[1:]):
        rows = min((size for size in sizes.values() if type(size) is int), default=0)
        read = read_vocabulary(first.folder) if _differ(sizes) or not positions else by_position(0)
        found[first.name] = read or by_position(rows)
    else:
        found = {model.name: read_vocabulary(model.folder) for model in having}
    unknown = [name for name, vocabulary in found.items() if vocabulary is None]
    if unknown:
        raise not_readable(unknown, source)
    known = {name: vocabulary for name, vocabulary in found.items() if vocabulary is not None}
    return {model.name: known.get(model.name, known[first.name]) for model in models}


def _same_tokens(vocabularies: Mapping[str, Vocabulary], sizes: Mapping[str, Any]) -> bool:
    """Return whether all rows are the same tokens'; tokens that an embedding has no row for, such as a late [PAD], do not
    count.
    """
    names = iter(vocabularies)
    first = next(names)
    if all(vocabularies[name].ids == vocabularies[first].ids for name in names):
        return True
    if any(type(size) is not int for size in sizes.values()):
        return False
    tokens = [{text: row for text, row in v.ids.items() if row < sizes[name]} for name, v in vocabularies.items()]
    return all(ids == tokens[0] for ids in tokens[1:])


def _row_numbers(size: int, numbers: Mapping[int, int]) -> np.ndarray:
    """The numbers [V] of rows by their place in the result, -1 elsewhere."""
    rows_V = np.full(size, -1, np.int32)
    rows_V[list(numbers)] = list(numbers.values())
    return rows_V


def _differ(sizes: Mapping[str, Any]) -> bool:
    return any(size != next(iter(sizes.values())) for size in sizes.values())


@dataclass(frozen=True)
class _RowCounts:
    """A model's tokens against the result's: how many are the same, how many it adds, which it lacks, which it loses."""

    shared: int
    added: int
    missing: Sequence[str]
    left_out: Sequence[str]

    @property
    def facts(self) -> dict[str, int]:
        """The counts, for the manifest."""
        counts = {"shared": self.shared, "added": self.added}
        return {**counts, "missing": len(self.missing), "left_out": len(self.left_out)}

    def described(self, result: Vocabulary, own: Vocabulary) -> str:
        """Describe it in a line, with the first few tokens as these vocabularies show them."""
        parts = [f"has {self.shared:,} of them"]
        parts += [f"brings {self.added:,}"] if self.added else []
        parts += [f"lacks {listed(map(result.shown, self.missing[:4]), len(self.missing))}"] if self.missing else []
        parts += [f"loses {listed(map(own.shown, self.left_out[:4]), len(self.left_out))}"] if self.left_out else []
        return ", ".join(parts)


@dataclass(frozen=True)
class _VocabularyMatch:
    """Models whose vocabularies differ, and whose tokens the result has."""

    models: Sequence[SourceModel]
    recipe: Recipe
    config_source: str
    source: str
    vocabularies: Mapping[str, Vocabulary]
    sizes: Mapping[str, int]

    def resolve(self, files: Mapping[str, bytes], warnings: Sequence[str]) -> tuple[ResolvedVocabulary, Move]:
        """The models with the rows of the result, and what gives their tokens their ids there."""
        names = token_tensors(self.models, self.sizes)
        self._check_ids()
        ids, brought = self._tokens(files)
        own = {name: own_rows(ids, vocabulary.ids, self.sizes[name]) for name, vocabulary in self.vocabularies.items()}
        alignment = self._alignment(names, ids, own)
        moved = {number: ids[text] for number, text in self.vocabularies[self.config_source].texts.items() if text in ids}
        configured = with_special_ids(self.models, self.source, self.config_source, moved=moved, vocab_size=alignment.size)
        counts = {name: self._counts(name, ids, rows_T, brought.get(name, ())) for name, rows_T in own.items()}
        notes = tuple(self._notes(alignment.size, counts, ids))
        facts = {"source": self.source, "union": self._union, "tokens": len(ids), "rows": alignment.size}
        facts |= {"models": {name: count.facts for name, count in counts.items()}, "notes": list(notes)}
        resolved = ResolvedVocabulary(
            tuple(with_rows(model, alignment, tuple(self.recipe.experts)) for model in configured),
            self.source,
            self._files(files, brought),
            alignment,
            facts,
            notes,
            (*warnings, *self._union_warnings(brought), *splitting_warnings(self.vocabularies, self.source)),
        )
        return resolved, Move(ids, self.vocabularies)

    def _alignment(self, names: frozenset[str], ids: Mapping[str, int], own: Mapping[str, np.ndarray]) -> Alignment:
        numbers_T = np.fromiter(ids.values(), np.int64, len(ids))
        multiple, given = self.recipe.pad_to_multiple_of, self._given(ids)
        given_T = np.isin(numbers_T, [number for numbers in given.values() for number in numbers])
        rows, plain = match_rows(
            self.source,
            own,
            numbers_T,
            self.sizes,
            self.vocabularies[self.source].next_id,
            given_T=given_T,
            padded=multiple is not None,
        )
        size, models = len(rows[self.source]), {model.name: model for model in self.models}
        padding = -size % multiple if multiple else 0
        if given or multiple:
            plain = frozenset()
        listed_rows = tuple(GivenRows(model, force, _row_numbers(size, numbers)) for (model, force), numbers in given.items())
        return Alignment(self.source, models, rows, names, plain, listed_rows, padding)

    def _given(self, ids: Mapping[str, int]) -> dict[tuple[str | None, bool], dict[int, int]]:
        """The rows that the recipe gives to tokens, by their ids in the result, for each model and with or without `force`."""
        found: dict[tuple[str | None, bool], dict[int, int]] = {}
        for text, row in self.recipe.tokens.items():
            number = ids[self._spelled(self.source, text)]
            found.setdefault((row.model, row.force), {})[number] = self._row_of(text, row)
        return found

    def _row_of(self, text: str, given: TokenRow) -> int:
        """The number of the row that a token gets; of zeros 0."""
        if given.model is None:
            return 0
        wanted, size = text if given.token is None else given.token, self.sizes[given.model]
        row = given.row
        if row is None:
            row = self.vocabularies[given.model].ids.get(self._spelled(given.model, wanted), size)
            if row >= size:
                raise InputError(f"tokenizer.tokens: {given.model} has no token {wanted!r}: name another model or token")
        if row >= size:
            raise InputError(f"tokenizer.tokens: {text!r}: {given.model} has {size:,} rows, none with the number {row}")
        return row

    def _spelled(self, model: str, text: str) -> str:
        """A token's text as the model's vocabulary has it; it may be given so already."""
        vocabulary = self.vocabularies[model]
        return text if text in vocabulary.ids else vocabulary.spelling.spell(text)

    @property
    def _union(self) -> bool:
        return self.recipe.tokenizer == UNION

    def _check_ids(self) -> None:
        limit = max(self.sizes.values()) + _FAR
        for name, vocabulary in self.vocabularies.items():
            if vocabulary.next_id > limit:
                raise InputError(
                    f"{name}: the tokenizer gives a token the id {vocabulary.next_id - 1:,}, far beyond the embedding's "
                    f"{self.sizes[name]:,} rows: it is damaged or another model's",
                    code="damaged-file",
                )

    def _tokens(self, files: Mapping[str, bytes]) -> tuple[dict[str, int], dict[str, list[NewToken]]]:
        """The result's tokens by text, and those that each model brings to a union."""
        ids: dict[str, int] = dict(self.vocabularies[self.source].ids)
        brought: dict[str, list[NewToken]] = {}
        number = first = self.vocabularies[self.source].next_id
        for name, vocabulary in self.vocabularies.items() if self._union else ():
            missing = [text for text, row in vocabulary.ids.items() if text not in ids and row < self.sizes[name]]
            tokens = (vocabulary.as_added(text) for text in sorted(missing, key=vocabulary.ids.__getitem__))
            brought[name] = [token for token in tokens if token is not None and self._can_be_added(token)]
            ids |= {token.text: number + index for index, token in enumerate(brought[name])}
            number += len(brought[name])
        spelled = {self._spelled(self.source, text): text for text in self.recipe.tokens}
        new = [NewToken(own, added_entry(text, {})) for own, text in spelled.items() if own not in ids]
        if new:
            brought[_GIVEN] = new
            ids |= {token.text: number + index for index, token in enumerate(new)}
            number += len(new)
        if number > first:
            self._check_extensible(files, first)
        return ids, brought

    def _can_be_added(self, token: NewToken) -> bool:
        """Return whether the tokenizers library gives it an id of its own: not if its text reads like another token's
        spelling.
        """
        return token.entry["content"] == token.text or token.entry["content"] not in self.vocabularies[self.source].ids

    def _check_extensible(self, files: Mapping[str, bytes], first: int) -> None:
        if "tokenizer.json" not in files:
            raise InputError(
                f"tokenizer: union adds tokens to the tokenizer.json of {self.source}, which has none: write one with "
                "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        if next_added_id(files["tokenizer.json"], self.vocabularies[self.source].added) != first:
            raise InputError(
                f"tokenizer: union: the ids of {self.source}'s tokens have gaps, so its tokenizer.json cannot take more: "
                "name a model instead"
            )

    def _files(self, files: Mapping[str, bytes], brought: Mapping[str, Sequence[NewToken]]) -> Mapping[str, bytes]:
        new = [token for tokens in brought.values() for token in tokens]
        if not new:
            return files
        vocabulary = self.vocabularies[self.source]
        return with_new_tokens(files, vocabulary.added, new, vocabulary.next_id)

    def _counts(self, name: str, ids: Mapping[str, int], rows_T: np.ndarray, brought: Sequence[NewToken]) -> _RowCounts:
        """Compare a model's tokens with the result's, for which it has the rows `rows_T`."""
        texts, vocabulary = list(ids), self.vocabularies[name]
        missing = [texts[index] for index in np.flatnonzero(rows_T < 0)]
        left_out = [text for text, row in vocabulary.ids.items() if text not in ids and row < self.sizes[name]]
        return _RowCounts(int((rows_T >= 0).sum()), len(brought), missing, left_out)

    def _notes(self, size: int, counts: Mapping[str, _RowCounts], ids: Mapping[str, int]) -> list[str]:
        if not any(count.missing or count.left_out for count in counts.values()) and self.recipe.tokenizer is None:
            sizes = ", ".join(f"{name} {rows:,}" for name, rows in self.sizes.items())
            return [f"embeddings differ by rows that are no token's only ({sizes}): the result has {size:,}, as {self.source}"]
        result = self.vocabularies[self.source]
        own = (f"tokens: {name} {count.described(result, self.vocabularies[name])}" for name, count in counts.items())
        return [f"the result has {len(ids):,} tokens in {size:,} rows", *own]

    def _union_warnings(self, brought: Mapping[str, Sequence[NewToken]]) -> list[str]:
        by_model = {name: new for name, new in brought.items() if name != _GIVEN}
        ordinary = {name: sum(token.text not in self.vocabularies[name].added for token in new) for name, new in by_model.items()}
        return [
            f"{count:,} of the tokens that {name} brings are ordinary ones there: as added tokens they are cut out of any text "
            f"before it is split, so the result splits text otherwise than {name} and {self.source} do"
            for name, count in ordinary.items()
            if count
        ]
