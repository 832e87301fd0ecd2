"""Experts that stay whole models: their tensors by name, and their rows for the tokens of one tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moerge.architecture.decoder import DecoderInterface
from moerge.architecture.decoder_interface import decoder_interface
from moerge.errors import InputError
from moerge.planning.checks import check_present, check_shapes, check_storage
from moerge.planning.models import SourceModel
from moerge.planning.vocab.chat import settle_chat, without_others
from moerge.planning.vocab.match import ResolvedVocabulary
from moerge.projectors.outputs import ExpertTables
from moerge.recipe.schema import Recipe
from moerge.tensors.digest import combined_digest, file_digest
from moerge.tensors.dtypes import DType
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.rounded import Rounded
from moerge.tokenizer import companion_files, has_tokenizer
from moerge.tokenizer.composed import ComposedRows
from moerge.tokenizer.pieces import EXACT, TokenAlignment, align_vocabulary

_SHOWN = 3


@dataclass(frozen=True, eq=False)
class HeterogeneousExpert:
    """An expert: its tensors under the names that its family has on disk, and its rows for each token of the result.

    `unused` are tensors of the checkpoint that its model does not have.
    """

    model: SourceModel
    decoder: DecoderInterface
    pieces: TokenAlignment
    rows: int
    unused: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the recipe's name for it."""
        return self.model.name

    @cached_property
    def is_own(self) -> bool:
        """Return whether the result's tokens are its own, row by row."""
        own = np.array_equal(self.pieces.rows_P, np.arange(self.rows))
        return own and bool((self.pieces.kinds_V == EXACT).all())

    def mapped(self, name: str) -> Tensor:
        """A tensor with a row for each token of the result, as the expert has it."""
        pieces = self._head_pieces if name in (self.decoder.head, self.decoder.head_bias) else self.pieces
        return self._rows(name, self.model.tensors[name].shape[1:], pieces)

    def embedded(self, width: int, scale: float) -> Tensor:
        """Return the output of its embedding module for each token of the result, padded to `width`."""
        return self._rows(self.decoder.embedding, (width,), self.pieces, scale)

    def head(self, width: int) -> Tensor:
        """Rows whose product with its last hidden state is its logits, padded to `width`."""
        return self._rows(self.decoder.head or self.decoder.embedding, (width,), self._head_pieces, self.decoder.logit_scale)

    def head_bias(self) -> Tensor | None:
        """Return the bias of its logits, None if there is none."""
        name = self.decoder.head_bias
        return self._rows(name, (), self._head_pieces, self.decoder.logit_scale) if name else None

    def tables(self, embedding_scale: float, dtype: DType) -> ExpertTables:
        """Embedding and head as projectors see them: in the result's element type, so that what is the same stays so."""
        width, bias = self.decoder.width, self.head_bias()
        embedding, head = (Rounded(table, dtype) for table in (self.embedded(width, embedding_scale), self.head(width)))
        return ExpertTables(self.name, embedding, head, None if bias is None else Rounded(bias, dtype))

    @cached_property
    def _head_pieces(self) -> TokenAlignment:
        """Return the pieces of the head: of two tokens of the result that are one of the expert's, only one can have its
        probability.
        """
        return self.pieces.for_head()

    def _rows(self, name: str, width: tuple[int, ...], pieces: TokenAlignment, scale: float = 1.0) -> Tensor:
        tensor = self.model.tensors[name]
        if self.is_own and tensor.shape == (self.rows, *width) and scale == 1:
            return tensor
        return ComposedRows(name, tensor, pieces, width=width[0] if width else None, scale=scale)

    def remarks(self, *, shared: bool) -> list[str]:
        """Warnings about what the result does not have of it."""
        found = []
        if shared and self.decoder.soft_capping is not None:
            found.append(
                f"{self.name}: its logits are capped at {self.decoder.soft_capping:.4g}, and the shared head's are not: large "
                "ones come out larger ('embedding: separate' keeps the cap)"
            )
        if shared and not self.decoder.head_measured:
            found.append(
                f"{self.name}: what models of type {self.decoder.model_type!r} do to the head's outputs could not be found out: "
                "if they scale them, the result does not ('embedding: separate' keeps it)"
            )
        doubled = int(self.pieces.doubled_V.sum())
        if doubled and not shared and self.decoder.head is None:
            found.append(
                f"{self.name}: {doubled} tokens of the result are its token a second time, and since its head is its embedding "
                "each of the two gets the whole probability"
            )
        if self.unused:
            shown = ", ".join(self.unused[:_SHOWN])
            found.append(f"{self.name}: {len(self.unused)} tensors that its model does not use are left out: {shown}")
        return found


def heterogeneous_experts(experts: Sequence[SourceModel], chosen: SourceModel) -> tuple[HeterogeneousExpert, ...]:
    """The experts on the vocabulary of `chosen`, which may be one of them.

    Raises InputError for a model that is no decoder-only language model, lacks tensors or has some of other shapes, and for
    tokenizers that cannot be read or have nothing in common.
    """
    check_storage([*experts, chosen])
    decoders = {model.name: decoder_interface(model.written, model.name) for model in (*experts, chosen)}
    named = [(_renamed(model, decoders[model.name]), decoders[model.name]) for model in experts]
    rows = decoders[chosen.name].rows
    return tuple(_expert(model, decoder, chosen, rows) for model, decoder in named)


def _expert(model: SourceModel, decoder: DecoderInterface, chosen: SourceModel, rows: int) -> HeterogeneousExpert:
    known = {tensor.name for tensor in decoder.tensors}
    unused = tuple(name for name in model.tensors if name not in known and not _is_expected_leftover(model, decoder, name))
    kept = model.with_tensors({name: tensor for name, tensor in model.tensors.items() if name in known})
    check_shapes([kept], {model.name: kept.tensors}, decoder.tensors)
    pieces = align_vocabulary(chosen.checkpoint, model.checkpoint, rows, decoder.rows)
    return HeterogeneousExpert(kept, decoder, pieces, rows, unused)


def _renamed(model: SourceModel, decoder: DecoderInterface) -> SourceModel:
    """The model with its tensors under the names that they have in the result; InputError if one is missing."""
    tensors = dict(model.tensors)
    for tensor in decoder.tensors:
        alias = next((name for name in decoder.aliases(tensor.name) if name in tensors), None)
        if alias is not None and alias != tensor.name:
            tensors[tensor.name] = tensors.pop(alias)
    if decoder.embedding not in tensors:
        raise InputError(
            f"{model.name}: {model.folder} has no input embedding ({decoder.embedding!r}), so no text can be put in: "
            "fetch or copy the checkpoint again"
        )
    check_present([model], {model.name: tensors}, decoder.tensors)
    return model.with_tensors(tensors)


def _is_expected_leftover(model: SourceModel, decoder: DecoderInterface, name: str) -> bool:
    """Buffers of old checkpoints, and the copy of the embedding that some store as a tied head."""
    family = model.family
    if family is not None and (family.is_buffer(name) or (decoder.head is None and family.role_of(name) == "head")):
        return True
    return decoder.head is None and model.tensors[name].shape == (decoder.rows, decoder.width)


def tokenizer_source(models: Sequence[SourceModel], named: str | None) -> str:
    """The model whose tokenizer the result has: the one that is named, else the base, else the first expert.

    Raises InputError for models without a tokenizer, since which token a row is for could not be known.
    """
    without = [model for model in models if not has_tokenizer(model.folder)]
    if len(without) == len(models):
        raise InputError(
            f"none of these models has a tokenizer, so which token a row of an embedding is for is not known: copy each model's "
            f"tokenizer.json into its folder, such as {models[0].folder}"
        )
    if without:
        raise InputError(
            f"{without[0].name}: {without[0].folder} has no tokenizer, so which token a row of its embedding is for is not "
            "known: copy its tokenizer.json there"
        )
    return named or models[0].name


def resolve_tokenizer(
    recipe: Recipe, experts: Sequence[HeterogeneousExpert], models: Sequence[SourceModel], chosen: SourceModel
) -> ResolvedVocabulary:
    """The tokenizer's files, and how well each expert's rows fit it."""
    shares = {expert.name: expert.pieces.shares for expert in experts}
    notes = [f"tokens: {_described(name, share)}" for name, share in shares.items() if name != chosen.name]
    digests = {expert.name: file_digest(_bytes(expert.pieces)) for expert in experts}
    facts = {"source": chosen.name, "rows": experts[0].rows, "models": shares, "notes": notes}
    facts["digest"] = combined_digest(digests)  # an interrupted merge must not go on with another tokenizer
    alike = ResolvedVocabulary(tuple(models), chosen.name, companion_files(chosen.folder), facts=facts, notes=tuple(notes))
    chat = settle_chat(recipe, [chosen], chosen.name, alike.files, None)
    return alike.with_chat(without_others(chat, models, chosen.name))


def _bytes(pieces: TokenAlignment) -> bytes:
    return b"".join(part.tobytes() for part in (pieces.starts_V1, pieces.rows_P, pieces.doubled_V))


def _described(name: str, share: Mapping[str, float]) -> str:
    exact, composed, left = (f"{100 * share[key]:.1f}%" for key in ("exact", "composed", "left"))
    return f"{name} has {exact} of the result's, composes {composed} of its own pieces, and leaves {left} at its mean row"
