"""Rules: which method, with which weights, a tensor is merged by. Overrides are rules, and so is a mergekit file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from moerge.methods.method import MergeMethod

_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class TensorContext:
    """A tensor of the result, and where it stands in it.

    `slice_index` and `depth` (0 for the slice's first layer, 1 for its last; 0 for what is in no layer) are those of a dense
    model made of `slices`; a model without them is one slice. `inputs` are the models it is merged from, in order, with the
    tensor's name in each.
    """

    role: str
    name: str
    slice_index: int = 0
    depth: float = 0.0
    inputs: Mapping[str, str] = field(default_factory=dict)

    def name_in(self, model: str) -> str:
        """The tensor's name in a model."""
        return self.inputs.get(model, self.name)


@dataclass(frozen=True)
class MethodChoice:
    """The merge of a tensor. An expert that `weights` does not name has its own weight from the recipe.

    `dtype` is its element type in the result, where that is not left to the recipe and the models, `members` the models that
    it is merged from, where these are not all.
    """

    method: MergeMethod
    weights: Mapping[str, float] = field(default_factory=dict)
    dtype: str | None = None
    members: tuple[str, ...] | None = None


class MethodRule:
    """Decides about some tensors or all."""

    @property
    def pattern(self) -> str:
        """Return the pattern of its tensors, for the error that it matched none; empty if it may."""
        return ""

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """Return the methods that it may choose, as far as that is known without a model."""
        raise NotImplementedError

    @property
    def files(self) -> Mapping[str, bytes]:
        """Return the files that go into the checkpoint's folder so that it can be merged again."""
        return {}

    def choose(self, context: TensorContext) -> MethodChoice | None:
        """Choose the method of a tensor, or None to leave that to the next rule."""
        raise NotImplementedError

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """InputError where it does not fit models with tensors of these names and shapes."""


@dataclass(frozen=True)
class PatternRule(MethodRule):
    """One choice for all tensors that a pattern matches; every tensor if it is empty."""

    matching: str
    choice: MethodChoice

    @property
    def pattern(self) -> str:
        """The pattern."""
        return self.matching

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """The one method."""
        return (self.choice.method,)

    def choose(self, context: TensorContext) -> MethodChoice | None:
        """The choice, where the pattern matches."""
        return self.choice if not self.matching or matches(self.matching, context.role, context.name) else None


def matches(pattern: str, role: str, name: str) -> bool:
    """Return whether `pattern` means the tensor of this role path and name.

    A pattern is a tensor name with `*`, or the beginning of a role path, `layers.N.` optional: `attention`, `ffn.down`,
    `layers.0-3.attention`, `layers.7`, `embedding`. `*` stands for one part and `0-3` for the layers 0 to 3.
    """
    if fnmatchcase(name, pattern):
        return True
    wanted, parts = pattern.split("."), role.split(".")
    if wanted[0] != "layers" and parts[0] == "layers":
        parts = parts[2:]
    return len(wanted) <= len(parts) and all(_part_matches(w, p) for w, p in zip(wanted, parts, strict=False))


def _part_matches(wanted: str, part: str) -> bool:
    span = _RANGE.fullmatch(wanted)
    if span and part.isdigit():
        return int(span[1]) <= int(part) <= int(span[2])
    return fnmatchcase(part, wanted)
