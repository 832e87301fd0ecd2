"""Learned coefficients as a rule of the recipe: what each tensor is merged with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from moerge.errors import InputError
from moerge.methods.coefficients import Coefficients as CoefficientsMethod
from moerge.methods.coefficients import Weighed
from moerge.methods.method import MergeMethod, TaskVectorMethod, merge_method
from moerge.recipe.coefficients import FILE, Coefficients, chunk_count, chunk_size, read_coefficients, to_json
from moerge.recipe.document import Document
from moerge.recipe.rules import MethodChoice, MethodRule, TensorContext


@dataclass(frozen=True)
class Learnt(MethodRule):
    """Every tensor's own coefficients, the fixed one for those that did not learn; `source` is the file they are from."""

    found: Coefficients
    method: CoefficientsMethod
    source: str = FILE

    @property
    def files(self) -> dict[str, bytes]:
        """The coefficients again, for the checkpoint's folder."""
        return {FILE: to_json(self.found.to_json())}

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """The method as the recipe names it."""
        return (self.method,)

    def choose(self, context: TensorContext) -> MethodChoice:
        """The tensor's coefficients."""
        rows = self.found.by_tensor.get(context.name) or ((self.found.fixed,),) * len(self.found.experts)
        chunk = self.found.chunk_sizes.get(context.name, 1 << 62)
        return MethodChoice(
            Weighed(scale=self.method.scale, directions=directions(self.found, self.source), c_EC=rows, chunk=chunk)
        )

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """InputError unless the coefficients are for tensors of these names and shapes, the ones that are merged."""
        for name, rows in self.found.by_tensor.items():
            if name not in shapes:
                raise InputError(f"{self.source}: the models have no tensor {name!r} to merge: learn again with these models")
            size, count, chunk = prod(shapes[name]), len(rows[0]), self.found.chunk_sizes.get(name)
            if count > 1 and (count > size or chunk_count(size, count) != count or chunk_size(size, count) != chunk):
                raise InputError(
                    f"{self.source}: tensor {name!r} has {size} entries, which {count} chunks of {chunk} do not cut up: "
                    "learn again with these models"
                )


def directions(found: Coefficients, source: str = FILE) -> TaskVectorMethod:
    """The method whose task vectors the coefficients weigh. Raises InputError, naming `source`, where it is none."""
    settings = dict(found.directions)
    document = Document({}, source)
    try:
        kind = merge_method(str(settings.pop("method")))
    except InputError as error:
        raise document.error(("directions", "method"), f": {error}", code=error.code) from None
    method = document.build(kind, settings, ("directions",))
    if not isinstance(method, TaskVectorMethod):
        raise document.error(("directions", "method"), f": {method.name} has no task vectors: learn again")
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
    directions(found, str(path))
    return Learnt(found, method, str(path))
