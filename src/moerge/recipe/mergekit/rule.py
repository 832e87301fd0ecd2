"""The rule of a mergekit file for each tensor: the parameters of its models, its slices and its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moerge.methods.method import MergeMethod, merge_method
from moerge.recipe.document import Document, Key
from moerge.recipe.mergekit.methods import REQUIRED, Foreign, Values
from moerge.recipe.mergekit.modules import module_of
from moerge.recipe.mergekit.parameters import Settings, Value, resolve
from moerge.recipe.rules import MethodChoice, MethodRule, TensorContext


@dataclass(frozen=True)
class Source:
    """A model in a slice: its name, its layers, its own parameters, and where it stands in the file."""

    model: str
    layers: tuple[int, int] | None
    settings: Settings
    path: Key


@dataclass(frozen=True)
class Part:
    """A slice, a module, or all models of a file without either; `base` is the model that the others are compared with.

    `wider` are the settings of the module that a slice belongs to.
    """

    sources: tuple[Source, ...]
    settings: Settings
    base: str | None
    module: str = ""
    wider: Settings = field(default_factory=dict)

    @property
    def merged(self) -> tuple[Source, ...]:
        """The models that have weights."""
        return tuple(source for source in self.sources if source.model != self.base)


@dataclass(frozen=True)
class MergekitRule(MethodRule):
    """Decides about every tensor, by the filters and gradients of a mergekit file."""

    name: str
    foreign: Foreign
    parts: tuple[Part, ...]
    settings: Settings
    seed: int
    document: Document

    @property
    def methods(self) -> tuple[MergeMethod, ...]:
        """Our method, with its own defaults: what it is set to depends on the tensor."""
        nominal = {key: 1.0 if p.default in (REQUIRED, None) else p.default for key, p in self.foreign.parameters.items()}
        target = self.foreign.target(nominal, [nominal])
        return (merge_method(target.method)(),)

    def choose(self, context: TensorContext) -> MethodChoice:
        """The method with the settings for this tensor, and the weights of its models."""
        part = self._part(context)
        wide = (part.settings, part.wider, self.settings)
        shared_keys = [key for key, parameter in self.foreign.parameters.items() if not parameter.each]
        shared = {key: self._value(key, wide, context.name, context.depth) for key in shared_keys}
        each = [self._values_of(source, wide, context) for source in part.merged]
        target = self.foreign.target(shared, each)
        kind, settings = merge_method(target.method), dict(target.settings)
        if "seed" in kind.model_fields:
            settings["seed"] = self.seed
        if "origin" in kind.model_fields:
            settings.setdefault("origin", "zero" if part.base is None else "base")
        if target.method == "passthrough":
            settings["model"] = part.sources[0].model
        names = [source.model for source in part.merged]
        by_name = {key: dict(zip(names, v, strict=True)) if isinstance(v, list) else v for key, v in settings.items()}
        method = self.document.build(kind, by_name, ("parameters",))
        members = tuple(source.model for source in part.sources) if part.module else None
        return MethodChoice(method, dict(zip(names, target.weights, strict=True)), members=members)

    def _part(self, context: TensorContext) -> Part:
        modules = {part.module: part for part in self.parts if part.module}
        if not modules:
            return self.parts[context.slice_index]
        module = module_of(context.name, list(modules))
        if module is None:
            has = ", ".join(modules)
            message = f" have no part for tensor {context.name!r} ({has}): add one that its name begins with, or 'default'"
            raise self.document.error(("modules",), message)
        return modules[module]

    def _values_of(self, source: Source, wide: Sequence[Settings], context: TensorContext) -> Values:
        scopes, name = (source.settings, *wide), context.inputs[source.model]
        own = [key for key, parameter in self.foreign.parameters.items() if parameter.each]
        return {key: self._value(key, scopes, name, context.depth, source) for key in own}

    def _value(self, key: str, scopes: Sequence[Settings], name: str, depth: float, source: Source | None = None) -> Value | None:
        found = resolve(key, scopes, name, depth)
        default = self.foreign.parameters[key].default
        if found is None and default is REQUIRED:
            path: Key = ("parameters",) if source is None else source.path
            owner = f" in {source.model}" if source else ""
            raise self.document.error(path, f": {self.name} needs a {key!r}, and there is none for {name!r}{owner}: add one")
        value: Value | None = default if found is None else found
        return value
