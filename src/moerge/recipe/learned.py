"""Learned coefficients as a rule of the recipe: what each tensor is merged with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moerge.errors import InputError
from moerge.learn.coefficients import FILE, Coefficients, read_coefficients, to_json
from moerge.methods.coefficients import Coefficients as CoefficientsMethod
from moerge.methods.coefficients import Weighed
from moerge.methods.method import MergeMethod, TaskVectorMethod, merge_method
from moerge.recipe.document import Document
from moerge.recipe.rules import Choice, Place, Rule


@dataclass(frozen=True)
class Learnt(Rule):
    """Every tensor's own coefficients, the fixed one for those that did not learn."""

    found: Coefficients
    method: CoefficientsMethod

    @property
    def files(self) -> dict[str, bytes]:
        """The coefficients again, for the checkpoint's folder."""
        return {FILE: to_json(self.found.to_json())}

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """The method as the recipe names it."""
        return (self.method,)

    def choose(self, place: Place) -> Choice:
        """The tensor's coefficients."""
        rows = self.found.by_tensor.get(place.name) or ((self.found.fixed,),) * len(self.found.experts)
        chunk = self.found.chunk_sizes.get(place.name, 1 << 62)
        return Choice(Weighed(scale=self.method.scale, directions=directions(self.found), c_KC=rows, chunk=chunk))


def directions(found: Coefficients) -> TaskVectorMethod:
    """The method whose task vectors the coefficients weigh."""
    settings = dict(found.directions)
    kind = merge_method(str(settings.pop("method")))
    method = Document({}, "the coefficients' directions").build(kind, settings)
    if not isinstance(method, TaskVectorMethod):
        raise InputError(f"the coefficients' directions: {method.name} has no task vectors: learn again")
    return method


def read_rule(method: CoefficientsMethod, folder: Path, experts: tuple[str, ...]) -> Learnt:
    """The rule of a recipe in `folder` with these experts; InputError if the file was learned with others."""
    path = folder / method.file
    found = read_coefficients(path)
    if found.experts != experts:
        raise InputError(
            f"{path} was learned for the experts {', '.join(found.experts)}, but the recipe has {', '.join(experts)}: "
            "name the same ones in the same order, or learn again"
        )
    return Learnt(found, method)
