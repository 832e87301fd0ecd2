"""The models that a recipe names, each understood once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moerge.architecture import Family
from moerge.architecture.config import changed, nested_key, normalized_config
from moerge.architecture.stored import fits, stored_family, unwrapped
from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.expert import ExpertCheckpoint, expert_of
from moerge.checkpoint.locate import locate
from moerge.checkpoint.quantised import with_numbers
from moerge.checkpoint.reader import Checkpoint, is_adapter
from moerge.checkpoint.state_dict import open_model
from moerge.errors import InputError
from moerge.planning.merged import merged_checkpoint
from moerge.planning.plan import Plan
from moerge.recipe.schema import Recipe
from moerge.tensors.tensor import Tensor

Commits = Mapping[str, str | None]
Build = Callable[[Recipe, Commits], Plan]

_LAYER_NORM = re.compile(r"LayerNorm\.(gamma|beta)$")


@dataclass(frozen=True)
class SourceModel:
    """A model as planning understands it: its tensors under the names that its family's table has, and its config.

    `family` has the names and the head that the checkpoint has; None if moerge knows none.
    """

    checkpoint: Checkpoint
    family: Family | None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> SourceModel:
        """Understand a checkpoint. Raises InputError if it has a tensor under two names."""
        plain = unwrapped(checkpoint.tensors)
        family = stored_family(checkpoint.config, plain.values())
        if family is not None and family.source and not fits(family, checkpoint.config, plain.values()):
            family = None
        names = {stored: _canonical_name(name, family) for stored, name in plain.items()}
        if all(name == stored for stored, name in names.items()):
            return cls(checkpoint, family)
        tensors: dict[str, Tensor] = {}
        for stored, name in names.items():
            other = tensors.setdefault(name, checkpoint.tensors[stored])
            if other is not checkpoint.tensors[stored]:
                raise InputError(f"{checkpoint.name}: tensors {other.name!r} and {stored!r} are the same: remove one of them")
        model, wrapped = cls(checkpoint, family).with_tensors(tensors), next((s for s, n in plain.items() if s != n), None)
        left_by = "have a prefix that torch.compile or another wrapper leaves: read without it"
        return model.warned(f"{checkpoint.name}: {wrapped!r} and others {left_by}") if wrapped else model

    @property
    def name(self) -> str:
        """The recipe's name for it."""
        return self.checkpoint.name

    @property
    def model_type(self) -> str:
        """config.json's `model_type`."""
        return self.checkpoint.model_type

    @property
    def folder(self) -> Path:
        """The folder that its small files are in."""
        return self.checkpoint.folder

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Its tensors by name."""
        return self.checkpoint.tensors

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config in the one form that configs of all families are compared in."""
        return normalized_config(self.checkpoint.config, self.family)

    @property
    def written(self) -> Mapping[str, Any]:
        """Its config as config.json has it."""
        return self.checkpoint.config

    @property
    def nested(self) -> Any:
        """The language model's config inside the written one, where that is a config of several models."""
        return self.written.get(nested_key(self.written, self.family))

    def find_key(self, key: str) -> Any:
        """A value of the language model's part of the written config, or else of the rest."""
        inner = self.nested
        value = inner.get(key) if isinstance(inner, Mapping) else None
        return self.written.get(key) if value is None else value

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SourceModel:
        """The model with other tensors."""
        return replace(self, checkpoint=replace(self.checkpoint, tensors=tensors))

    def with_written(self, config: Mapping[str, Any]) -> SourceModel:
        """The model with another config.json; a derived family is derived again."""
        family = stored_family(config, self.tensors) if self.family is not None and self.family.source else self.family
        return replace(self, checkpoint=replace(self.checkpoint, config=config), family=family)

    def with_values(self, changes: Mapping[str, Any]) -> SourceModel:
        """The model with other values in its config, the language model's part too; None removes a key."""
        return self.with_written(changed(self.written, self.family, changes)) if changes else self

    def warned(self, *warnings: str) -> SourceModel:
        """The model with something more to say about it."""
        return replace(self, checkpoint=replace(self.checkpoint, warnings=(*self.checkpoint.warnings, *warnings)))


def _canonical_name(name: str, family: Family | None) -> str:
    """A tensor's name as its family's table has it, and as transformers has had it since it has no TensorFlow names."""
    name = _LAYER_NORM.sub(lambda match: "LayerNorm.weight" if match[1] == "gamma" else "LayerNorm.bias", name)
    return name if family is None else family.canonical_name(name)


def locate_models(recipe: Recipe, *, weights: bool, commits: Commits, build: Build) -> tuple[Checkpoint, ...]:
    """All models of the recipe, the base first where there is one; adapters on the base or on the model they are given with.

    `weights` downloads Hub models completely, at the `commits` given by model name; without it only their configs and
    headers are fetched. Models that are recipes are planned by `build`. Raises InputError if one cannot be opened, or is an
    adapter that does not fit.
    """
    locations = {"base": recipe.base} if recipe.base else {}
    locations |= {name: expert.model for name, expert in recipe.experts.items()}
    found: dict[str, Checkpoint] = {}
    for name, location in locations.items():
        if name in recipe.recipes:
            found[name] = merged_checkpoint(build(recipe.recipes[name], _inside(commits, name)), name, location)
        else:
            found[name] = open_model(location, name=name, relative_to=recipe.folder, weights=weights, commit=commits.get(name))
    found = {name: with_numbers(model) for name, model in _experts_alike(found).items()}
    _check_bare(found)
    base = found.get("base")
    if base is not None and recipe.base_adapter is not None:
        base = found["base"] = _adapted(recipe, base, recipe.base_adapter, weights, commits)
    if base is not None and is_adapter(base):
        raise InputError(f"base: {base.folder} is an adapter: name the model that it was trained on{_trained_on(base)}")
    models = {name: _model(model, base, recipe) for name, model in found.items()}
    for name, expert in recipe.experts.items():
        if expert.adapter is not None:
            models[name] = _adapted(recipe, models[name], expert.adapter, weights, commits)
    return tuple(models.values())


def _experts_alike(models: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
    """The models with experts of mixtures as the dense type that the others are, where several types fit the mixture."""
    types = tuple(dict.fromkeys(m.model_type for m in models.values() if not isinstance(m, ExpertCheckpoint)))
    return {
        name: expert_of(m.mixture, m.expert, m.location, types) if isinstance(m, ExpertCheckpoint) and types else m
        for name, m in models.items()
    }


def _check_bare(models: Mapping[str, Checkpoint]) -> None:
    """InputError where one model has no config.json, and others have."""
    bare = [model for model in models.values() if not model.config]
    if bare and len(bare) < len(models):
        place = bare[0].folder
        if place.is_file():
            raise InputError(f"{place} is a file: name the checkpoint's folder instead")
        raise InputError(f"{place / 'config.json'} is missing: a checkpoint folder needs it", code="not-found")


def _inside(commits: Commits, name: str) -> Commits:
    """The commits of the models of one that is a recipe."""
    return {key.removeprefix(f"{name}/"): commit for key, commit in commits.items() if key.startswith(f"{name}/")}


def _adapted(recipe: Recipe, model: Checkpoint, location: str, weights: bool, commits: Commits) -> Checkpoint:
    """A model with an adapter of its own."""
    commit = commits.get(f"{model.name}+adapter")
    adapter = locate(location, name=model.name, relative_to=recipe.folder, weights=weights, commit=commit)
    if not is_adapter(adapter):
        raise InputError(f"{recipe.source}: adapter of {model.name}: {adapter.folder} is a whole model, not an adapter")
    expert = recipe.experts.get(model.name)
    made = apply_adapter(adapter, model, expert.packing if expert else None)
    return replace(made, location=f"{model.location}+{location}", complete=made.complete and model.complete)


def _model(model: Checkpoint, base: Checkpoint | None, recipe: Recipe) -> Checkpoint:
    expert, source = recipe.experts.get(model.name), recipe.source
    packing = expert.packing if expert else None
    if not is_adapter(model):
        if packing and expert and not expert.adapter:
            raise InputError(f"{source}: experts.{model.name}.packing is for adapters, and this is a whole model: remove it")
        return model
    if base is None:
        trained_on = f"the model that it was trained on{_trained_on(model)}"
        raise InputError(
            f"{source}: {model.name} is an adapter, so the recipe needs a 'base', {trained_on}, or this expert a 'model' and an "
            "'adapter' on it"
        )
    return apply_adapter(model, base, packing)


def _trained_on(adapter: Checkpoint) -> str:
    named = adapter.config.get("base_model_name_or_path")
    return f" ({named})" if named else ""
