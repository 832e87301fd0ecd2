"""The facts of a statistics file about itself: model, text, settings."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moerge.errors import InputError

Kind = Literal["fisher", "gram"]
KINDS: dict[Kind, str] = {"fisher": "fisher", "gram": "regmean"}
"""Each kind of statistic and the merge method that it is for, by which `--kind` calls it."""


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFacts(_Fact):
    """The model that was run. `digests` are those of its tensors' bytes.

    `folder` and `stamps` (file name, size, time in ns) tell on the same machine whether it has changed since.
    """

    location: str
    folder: str
    revision: str | None
    stamps: tuple[tuple[str, int, int], ...]
    digests: dict[str, str]

    def is_same(self, other: ModelFacts) -> bool:
        """Return whether both are the same bytes, wherever they lie."""
        return self.digests == other.digests


class TextFacts(_Fact):
    """Documents that were run: those of `digest`, or every n-th of them from number i on where `part` is (i, n)."""

    location: str
    digest: str
    part: tuple[int, int] = (1, 1)
    documents: tuple[str, ...] = Field(repr=False)

    def overlap(self, other: TextFacts) -> int:
        """Return the number of documents of this text that were also run in `other`. Parts of one whole never overlap."""
        siblings = (self.digest, self.part[1]) == (other.digest, other.part[1])
        if siblings and self.part != other.part:
            return 0
        return len(set(self.documents) & set(other.documents))


class Settings(_Fact):
    """The settings of running text: at most `tokens` tokens of a document, in element type `dtype`.

    `labels` says whose next token Fisher information is taken at: the text's (`text`) or one drawn from the model (`sampled`)
    by `seed`.
    """

    tokens: int
    dtype: str
    labels: Literal["text", "sampled"] = "text"
    seed: int = 0


class Gram(_Fact):
    """The place of a linear layer's Gram matrix, and the axis of the layer's weight that is its input."""

    stored: str
    axis: Literal[0, 1] = 1


class Facts(_Fact):
    """All of it. `fisher` holds the sum and the sum of squares of each tensor's statistic, `grams` is by the weight's name.

    `sequences` and `tokens` count what was run, `predicted` the tokens that Fisher information was taken at. `without` are
    tensors that cannot have a kind of statistic: not a parameter that text passes through, or not a linear layer's.
    """

    format: Literal[1] = 1
    expert: str
    model: ModelFacts
    settings: Settings
    texts: tuple[TextFacts, ...]
    sequences: int
    tokens: int
    predicted: int
    fisher: dict[str, tuple[float, float]] = Field(default_factory=dict)
    grams: dict[str, Gram] = Field(default_factory=dict)
    without: dict[Kind, tuple[str, ...]] = Field(default_factory=dict)

    @property
    def documents(self) -> tuple[str, ...]:
        """`document_hash` of every document that was run."""
        return tuple(document for text in self.texts for document in text.documents)

    @property
    def names(self) -> dict[Kind, frozenset[str]]:
        """The tensors that have each kind of statistic."""
        return {"fisher": frozenset(self.fisher), "gram": frozenset(self.grams)}


def parse_facts(text: str, where: object) -> Facts:
    """Facts from JSON; InputError if they are damaged or of another version."""
    try:
        return Facts.model_validate_json(text)
    except ValidationError:
        raise InputError(
            f"{where} holds no statistics that this moerge can read: gather them again with 'moerge stats'"
        ) from None


def differing_settings(first: Settings, second: Settings) -> str:
    """The settings in which two files differ, as a list for a message."""
    one, two = first.model_dump(), second.model_dump()
    return ", ".join(f"{key} {one[key]} and {two[key]}" for key in one if one[key] != two[key])
