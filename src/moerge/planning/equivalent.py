"""A recipe of ours that says the same as a plan's, whatever format that was in."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from moerge.checkpoint.adapter import AdaptedCheckpoint
from moerge.checkpoint.expert import SEPARATOR, split_reference
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.methods.average import Average
from moerge.operations.operations import Copy, Merge, Output
from moerge.planning.merged import MergedCheckpoint
from moerge.planning.plan import Plan
from moerge.recipe.mergekit import is_mergekit
from moerge.recipe.rules import matches
from moerge.recipe.schema import MoE, Recipe
from moerge.recipe.tokens import TokenRow

Section = dict[str, Any]


def equivalent_recipe(plan: Plan) -> dict[str, Any]:
    """The recipe as a dict, in the form of a YAML file; as it was written, if it is one of ours already.

    Paths of local models become absolute, since mergekit's start elsewhere than ours.
    Raises InputError where there is none: layers that stand elsewhere than in their models.
    """
    recipe = plan.recipe
    if not is_mergekit(recipe.written):
        return recipe.written
    if recipe.slices and not _in_place(plan):
        raise InputError(f"{recipe.source}: moerge's own recipes cannot move layers as these slices do: keep this file as it is")
    if len({_members(output) for output in plan.outputs if isinstance(output.operation, Merge)}) > 1 and not recipe.slices:
        raise InputError(f"{recipe.source}: moerge's own recipes merge all tensors from the same models: keep this file as it is")
    places = {model.name: _model_of(plan, model) for model in plan.models}
    sections = {output.name: _section(output) for output in plan.outputs if _is_float(output)} if recipe.moe is None else {}
    weights, merge = _usual(sections.values()) if sections else ({}, {"method": recipe.method.name, **dict(recipe.method)})
    overrides = _overrides(plan.outputs, sections, weights, merge)
    adapters = {name: _place(expert.adapter, recipe.folder) for name, expert in recipe.experts.items() if expert.adapter}
    experts = {name: _expert(places[name], weights.get(name, 1.0), adapters.get(name)) for name in recipe.experts}
    base = places.get("base")
    if recipe.base_adapter:
        base = {"model": base, "adapter": _place(recipe.base_adapter, recipe.folder)}
    return {
        **({"base": base} if recipe.base else {}),
        "experts": experts,
        "merge": {**merge, **({"overrides": overrides} if overrides else {})},
        **({"moe": _moe(recipe.moe)} if recipe.moe else {}),
        **{key: value for key in ("dtype", "config") if (value := getattr(recipe, key)) is not None},
        **_tokenizer(recipe),
    }


def _tokenizer(recipe: Recipe) -> dict[str, Any]:
    """The `tokenizer` key, a section where rows or padding are given."""
    if not recipe.tokens and not recipe.pad_to_multiple_of:
        return {"tokenizer": recipe.tokenizer} if recipe.tokenizer else {}
    tokens = {text: _row(row) for text, row in recipe.tokens.items()}
    section = {"source": recipe.tokenizer, "tokens": tokens, "pad_to_multiple_of": recipe.pad_to_multiple_of}
    return {"tokenizer": {key: value for key, value in section.items() if value}}


def _row(row: TokenRow) -> dict[str, Any]:
    given = {"token": row.token, "token_id": row.row}
    named = {key: value for key, value in given.items() if value is not None}
    source: Any = {"kind": "model_token", "model": row.model, **named} if named else row.model or {"kind": "zero"}
    return {"source": source, "force": row.force}


def _members(output: Output) -> tuple[str, ...]:
    """The models that a tensor is merged from."""
    return tuple(source.model for source in output.operation.sources)


def _in_place(plan: Plan) -> bool:
    """Return whether every layer stands where it stood, and none is left out."""
    model = next(model for model in plan.models if model.name == plan.recipe.config)
    made = max(_number(output.name) for output in plan.outputs)
    moved = any(source.tensor.name != output.name for output in plan.outputs for source in output.operation.sources)
    return not moved and made == max(map(_number, model.tensors))


def _number(name: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else -1


def _expert(place: Any, weight: float, adapter: str | None) -> Any:
    more = {**({"adapter": adapter} if adapter else {}), **({"weight": weight} if weight != 1 else {})}
    return {"model": place, **more} if more else place


def _model_of(plan: Plan, model: Checkpoint) -> Any:
    """A model's path or Hub id, or the recipe that it is."""
    found = model.base if isinstance(model, AdaptedCheckpoint) and model.base.name == model.name else model
    return equivalent_recipe(found.plan) if isinstance(found, MergedCheckpoint) else _place(found.location, plan.recipe.folder)


def _place(location: str, folder: Path) -> str:
    model, expert = split_reference(location, folder)
    path = folder / Path(model).expanduser()
    place = os.path.abspath(path) if path.exists() else model
    return place if expert is None else f"{place}{SEPARATOR}{expert}"


def _is_float(output: Output) -> bool:
    """Return whether a tensor is merged: others are copied from the `config` model anyway."""
    return output.dtype.is_float


def _section(output: Output) -> Section:
    """Return the keys of a `merge` section for a tensor, with all weights."""
    operation = output.operation
    if isinstance(operation, Copy):
        return {"method": "passthrough", "model": operation.source.model}
    assert isinstance(operation, Merge)
    names = [source.model for source in operation.experts]
    if output.action == "convert" and isinstance(operation.method, Average):
        return {"method": "passthrough", "model": names[0]}
    settings = {
        key: dict(zip(names, value, strict=True)) if isinstance(value, tuple) else value for key, value in operation.method
    }
    weighed = {"weights": dict(zip(names, operation.weights, strict=True))} if operation.method.uses_weights else {}
    return {"method": operation.method.name, **settings, **weighed}


def _usual(sections: Collection[Section]) -> tuple[Mapping[str, float], Section]:
    """The weights and the settings that most tensors have."""
    found = {repr(section): section for section in sections}
    usual = dict(found[Counter(map(repr, sections)).most_common(1)[0][0]])
    return usual.pop("weights", {}), usual


def _overrides(
    outputs: Sequence[Output], sections: Mapping[str, Section], weights: Mapping[str, float], merge: Section
) -> list[Section]:
    usual = repr(merge | ({"weights": dict(weights)} if weights else {}))
    groups: dict[str, list[Output]] = {}
    for output in outputs:
        if output.name in sections and repr(sections[output.name]) != usual:
            groups.setdefault(repr(sections[output.name]), []).append(output)
    found = []
    for group in groups.values():
        section = sections[group[0].name]
        own = {key: value for key, value in section.items() if section["method"] != merge["method"] or merge.get(key) != value}
        if section.get("weights") == dict(weights):
            own.pop("weights", None)
        found += [{"match": pattern, **own} for pattern in _patterns(group, outputs)]
    return found


def _patterns(group: Sequence[Output], outputs: Sequence[Output]) -> list[str]:
    """Few patterns that mean these tensors and no others: beginnings of roles where possible, else names."""
    wanted = {output.name for output in group}
    candidates: dict[str, None] = {}
    for output in group:
        parts = output.role.split(".") if output.role else []
        layer, inner = (parts[:2], parts[2:]) if parts[:1] == ["layers"] else ([], parts)
        candidates |= {".".join([*stem, *inner[:n]]): None for stem in ([], layer) for n in range(len(inner) + 1)}
    means = {c: {output.name for output in outputs if matches(c, output.role, output.name)} for c in candidates if c}
    chosen = []
    for candidate, names in sorted(means.items(), key=lambda item: -len(item[1])):
        if names and names <= wanted:
            chosen.append(candidate)
            wanted -= names
    return chosen + sorted(wanted)


def _moe(moe: MoE) -> Section:
    router = {"kind": moe.router.kind, **_plain(moe.router.model_dump(exclude_defaults=True))}
    return {**_plain(moe.model_dump(exclude={"router"}, exclude_unset=True)), "router": router}


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
