"""The owners of tensors that not all models have: by the recipe's `parts`, else the config's model; or they are left out."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from moerge.architecture.parts import PARTS, means_part, part_of
from moerge.checkpoint.adapter import holds_vocabulary
from moerge.errors import Code, InputError, suggest
from moerge.recipe.rules import matches
from moerge.recipe.schema import DROP, Recipe
from moerge.tensors.tensor import Tensor

_BUFFERS = re.compile(r".*\.(inv_freq|masked_bias|position_ids|num_batches_tracked)")
"""What some versions of transformers store and others compute."""


@dataclass
class Parts:
    """Decides about tensors one after the other, and keeps what there is to say about them.

    `owners` are the models that tensors are taken from as they are, `dropped` those that the result does not have. `source` is
    the config's model, which `layers` belong to; `needed` are the tensors that its family has.
    """

    recipe: Recipe
    source: str
    layers: int | None
    stored: Mapping[str, Mapping[str, Tensor]]
    needed: Collection[str]
    owners: dict[str, str] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)
    _said: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _used: set[str] = field(default_factory=set)

    def decide(self, name: str, role: str, *, beside: bool) -> None:
        """Decide on the owner of a tensor that not all models share; `beside` the language model shapes may differ.

        Raises InputError for a tensor without which a model is damaged.
        """
        having = [model for model, tensors in self.stored.items() if name in tensors]
        part = part_of(name, self.layers)
        patterns = sorted(self.recipe.parts, key=lambda pattern: pattern != part)  # the narrower of two parts first
        pattern = next((p for p in patterns if means_part(p, name, self.layers) or matches(p, role, name)), None)
        if pattern is not None:
            self._used.add(pattern)
            self._ask(name, pattern, self.recipe.parts[pattern], having)
        elif len(having) < len(self.stored):
            self._default(name, having)
        elif beside and len({self.stored[model][name].shape for model in having}) > 1:
            self._take(name, self.source, "shaped otherwise in other models")

    @property
    def shared(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of each model that are merged."""
        apart = self.owners.keys() | self.dropped
        stored = self.stored.items()
        return {model: {name: t for name, t in tensors.items() if name not in apart} for model, tensors in stored}

    def warnings(self) -> list[str]:
        """Return warnings about what was taken and left out; InputError for a part of the recipe's that no model has."""
        for pattern in self.recipe.parts:
            if pattern not in self._used:
                known = {part_of(name, self.layers) for tensors in self.stored.values() for name in tensors}
                raise self._error(
                    f"{pattern!r} is no part of a model here, {suggest(pattern, sorted(known))}", code="unknown-name"
                )
        return [f"{part}: {len(names)} tensors {what}: {names[0]}" for (part, what), names in self._said.items()]

    def _ask(self, name: str, pattern: str, asked: str, having: Sequence[str]) -> None:
        if asked == DROP:
            if name in self.needed:
                raise self._error(f"{pattern!r} drops tensor {name!r}, which the model needs: name a model instead")
            self.dropped.add(name)
        elif asked in having:
            self.owners[name] = asked
        elif name in self.needed or not any(means_part(pattern, other, self.layers) for other in self.stored[asked]):
            raise self._error(f"{asked} has no tensor {name!r} for {pattern!r}, but {', '.join(having)} has")
        else:
            self._leave(name, f"that {asked} does not have are left out, since 'parts' takes {pattern} from it")

    def _error(self, problem: str, code: Code | None = None) -> InputError:
        return InputError(f"{self.recipe.source}: parts: {problem}", code=code)

    def _default(self, name: str, having: Sequence[str]) -> None:
        lacking = [model for model in self.stored if model not in having]
        damaged = next((model for model in lacking if not self._can_lack(model, name, self.stored[having[0]][name])), None)
        if damaged is not None:
            raise InputError(
                f"tensor {name!r} is in {', '.join(having)} but not in {', '.join(lacking)}: merging would drop it, so repair or "
                f"leave out the odd model, or say whose it is: \"parts: {{'{name}': {having[0]}}}\", or drop",
                code="models-differ",
            )
        part = part_of(name, self.layers)
        if self.source in having:
            self._take(name, self.source, f"{', '.join(lacking)} lacks")
        else:
            taking = f"'parts: {{{part}: {having[0]}}}' takes those of {having[0]}"
            self._leave(name, f"that {self.source}, whose config.json is used, does not have are left out ({taking})")

    def _can_lack(self, model: str, name: str, tensor: Tensor) -> bool:
        """Return whether a model is whole without a tensor: a part of which it has nothing, or what others compute when they
        load.

        A layer that it has, an embedding or a head is not such a part.
        """
        if not tensor.dtype.is_float or _BUFFERS.fullmatch(name):
            return True
        part = part_of(name, self.layers)
        if name in self.needed or (holds_vocabulary(name) and part not in PARTS):
            return False
        inside = part not in PARTS and (name.startswith("model.") or re.match(r"(.*\.)?(layers|h|blocks|layer)\.\d+\.", name))
        return not inside and not any(part_of(other, self.layers) == part for other in self.stored[model])

    def _take(self, name: str, owner: str, why: str) -> None:
        self.owners[name] = owner
        self._say(name, f"that not all models share are {owner}'s ({why})")

    def _leave(self, name: str, why: str) -> None:
        self.dropped.add(name)
        self._say(name, why)

    def _say(self, name: str, what: str) -> None:
        self._said.setdefault((part_of(name, self.layers), what), []).append(name)
