"""Alignment of the models' rows with the result's, where vocabularies differ.

Shapes: V rows of the result, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from moerge.operations.operations import Merge
from moerge.planning.models import SourceModel
from moerge.tensors.source import Source
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.rows import (
    ZERO,
    OverwriteRows,
    RowSource,
    RowsTensor,
    count_holders,
    pick_rows,
    with_mean_rows,
)

_LARGEST_MULTIPLE = 128
GIVEN = "+given"
"""After the name of a model, in that of a source of rows; no model's name has a plus."""


@dataclass(frozen=True, eq=False)
class GivenRows:
    """Rows of a `model`, or of zeros, that are those of the result's tokens, [V] (-1 for the others)."""

    model: str | None
    force: bool
    rows_V: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class Alignment:
    """The models' rows, matched.

    `rows` has for each model its row for each of the V, or -1. `names` are the tensors whose rows are tokens, as the models
    call them. `source` is the model whose tokenizer the result has: rows that are no token's are its. `plain` are models whose
    rows stand where the result has them, but for rows that are no token's. `given` are rows that the recipe gives to tokens.
    After the V rows come `padding` more, each the mean of the others.
    """

    source: str
    models: Mapping[str, SourceModel] = field(repr=False)
    rows: Mapping[str, np.ndarray] = field(repr=False)
    names: frozenset[str]
    plain: frozenset[str]
    given: tuple[GivenRows, ...] = ()
    padding: int = 0

    @property
    def size(self) -> int:
        """The result's vocab_size."""
        return len(self.rows[self.source]) + self.padding

    @cached_property
    def digest(self) -> str:
        """A digest of the whole mapping."""
        parts = [name.encode() + b"\0" + np.ascontiguousarray(rows_V).tobytes() for name, rows_V in sorted(self.rows.items())]
        parts += [f"{given.model}\0{given.force}".encode() + given.rows_V.tobytes() for given in self.given]
        return hashlib.sha256(b"".join((*parts, *([str(self.padding).encode()] if self.padding else ())))).hexdigest()

    def view(self, model: str, experts: Sequence[str]) -> Mapping[str, Tensor]:
        """All tensors of a model with the result's rows: its own, else the base's, else the mean of what `experts` have."""
        tensors = dict(self.models[model].tensors)
        for name in self.names & tensors.keys():
            tensors[name] = self._one(name, model, ("base",), experts, [1.0] * len(experts))
        return tensors

    def aligned(self, merge: Merge, name: str) -> Merge:
        """The merge of the models' own tensors `name` as one of tensors with the result's rows.

        With a base, an expert's missing row is the base's, so that it changes nothing, and one that the base lacks too is, for
        all that lack it, the mean of the experts that have it. Without a base it is their mean by the weights of the merge. In
        statistics it is zero. Rows that one model alone has are kept to the last bit.
        """
        experts, base = [source.model for source in merge.experts], merge.base.model if merge.base else None
        chain, weights = (base,) if base is not None else (), [1.0] * len(experts)
        shares = merge.weights if base is None and merge.method.uses_weights else weights
        involved = list(dict.fromkeys((*chain, *experts)))
        exact_V = self._exact(involved)
        owners = pick_rows(self._given(name), self._holders(name, involved), [1.0] * len(involved), self._fallbacks(name))
        return replace(
            merge,
            experts=tuple(Source(model, self._one(name, model, chain, experts, shares)) for model in experts),
            base=Source(base, self._one(name, base, (), experts, weights)) if base is not None else None,
            extras=tuple(
                self._extra(source, extra) for source, extra in zip(merge.experts, merge.extras, strict=bool(merge.extras))
            ),
            exact=OverwriteRows(owners, exact_V) if exact_V.any() else None,
        )

    def _extra(self, source: Source, extra: Source | None) -> Source | None:
        """A statistic with the result's rows, if it has one for each row of its expert's tensor."""
        if extra is None or extra.tensor.shape != source.tensor.shape:
            return extra
        rows_V = self.rows[source.model]
        rows_V = np.concatenate([rows_V, np.full(self.padding, -1, rows_V.dtype)])
        picks_V = np.where(rows_V >= 0, np.int16(0), np.int16(ZERO))
        return Source(extra.model, RowsTensor(extra.tensor.name, (extra.tensor,), (rows_V,), picks_V))

    def _one(self, name: str, model: str, chain: Sequence[str], donors: Sequence[str], weights: Sequence[float]) -> Tensor:
        stored = self.models[model].tensors[name]
        if model in self.plain and stored.shape[0] == self.size:
            return stored
        own, *others = self._holders(name, [other for other in dict.fromkeys((model, *chain)) if other in self.models])
        first = [*self._given(name, force=True), own, *self._given(name, force=False), *others]
        tensor = pick_rows(first, self._holders(name, donors), weights, self._fallbacks(name))
        return with_mean_rows(tensor, self.padding) if self.padding else tensor

    def _exact(self, involved: Sequence[str]) -> np.ndarray:
        """The rows that the models have alike, because one alone has them, or because they are given, [V]."""
        having_V = count_holders([self.rows[model] for model in involved])
        exact_V: np.ndarray = having_V <= 1
        for given in self.given:
            named_V = given.rows_V >= 0
            exact_V = np.where(named_V, given.force | (having_V == 0), exact_V)
        return exact_V

    def _given(self, name: str, *, force: bool | None = None) -> list[RowSource]:
        """The rows that the recipe gives; those for all models, or for those that lack them, or both."""
        tensors = {model.name: model.tensors[name] for model in self.models.values()}
        return [
            RowSource(f"{given.model}{GIVEN}{number}", tensors[given.model] if given.model else None, given.rows_V)
            for number, given in enumerate(self.given)
            if force in (None, given.force)
        ]

    def _fallbacks(self, name: str) -> list[RowSource]:
        return self._holders(name, (self.source, *(model for model in self.models if model != self.source)))

    def _holders(self, name: str, models: Iterable[str]) -> list[RowSource]:
        return [RowSource(model, self.models[model].tensors[name], self.rows[model]) for model in models]


def with_rows(model: SourceModel, alignment: Alignment, experts: Sequence[str]) -> SourceModel:
    """The model as if it had the result's vocabulary."""
    return model.with_tensors(alignment.view(model.name, experts))


def own_rows(ids: Mapping[str, int], own: Mapping[str, int], size: int) -> np.ndarray:
    """For each of the T tokens in `ids`, in order, the row of a model that gives its tokens the ids `own`; -1 for none."""
    rows_T = np.fromiter((own.get(text, -1) for text in ids), np.int32, len(ids))
    rows_T[rows_T >= size] = -1  # a token that the embedding has no row for
    return rows_T


def match_rows(
    source: str,
    own: Mapping[str, np.ndarray],
    numbers_T: np.ndarray,
    sizes: Mapping[str, int],
    tokens: int,
    *,
    given_T: np.ndarray | None = None,
    padded: bool = False,
) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Each model's rows for the V rows of the result; and the models whose tokens stand where the result has them.

    `own` are the models' rows for T tokens, `numbers_T` their ids in the result, `tokens` the first id after the source's.
    Rows that are no token's are the source's; where it has too few, its last one again. Tokens of `given_T` have rows whatever
    the models have. With `padded` there are no rows behind the last token's: others will come there.
    """
    used_T = np.any([rows_T >= 0 for rows_T in own.values()], axis=0)
    given_T = np.zeros_like(used_T) if given_T is None else given_T
    used_T |= given_T
    needed = int(numbers_T[used_T].max(initial=-1)) + 1
    size = needed if padded else result_size(sizes[source], tokens, needed)
    inside_T = numbers_T < size
    rows, plain = {}, set()
    for name, rows_T in own.items():
        rows[name] = np.full(size, -1, np.int32)
        rows[name][numbers_T[inside_T]] = rows_T[inside_T]
        if np.array_equal(rows_T[inside_T], numbers_T[inside_T]):
            plain.add(name)
    nobody_V = np.all([rows_V < 0 for rows_V in rows.values()], axis=0)
    nobody_V[numbers_T[given_T & inside_T]] = False
    rows[source][nobody_V] = np.minimum(np.flatnonzero(nobody_V), sizes[source] - 1)
    return rows, frozenset(plain)


def result_size(rows: int, tokens: int, needed: int) -> int:
    """vocab_size of a result with `needed` rows, whose source has `rows` for `tokens` tokens.

    It is the source's where that suffices. Otherwise, if the source is padded, it is rounded up to a multiple of the largest
    power of two, up to 128, that divides the source's.
    """
    if needed <= rows:
        return rows
    multiple = min(rows & -rows, _LARGEST_MULTIPLE) if rows > tokens else 1
    return -(-needed // multiple) * multiple
