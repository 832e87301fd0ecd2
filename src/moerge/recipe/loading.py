"""From a YAML file, or a dict, to a Recipe; all that can be checked without looking at a model is checked here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from moerge.architecture import moe_formats
from moerge.errors import Code, InputError, suggest
from moerge.files import as_path
from moerge.methods.coefficients import Coefficients
from moerge.methods.method import MergeMethod, cancel, merge_method
from moerge.methods.passthrough import Passthrough
from moerge.modeling.adapters_moerge import ADAPTED_ROLES
from moerge.recipe.document import Document, Key, plain_copy
from moerge.recipe.heterogeneous import conflicting_key
from moerge.recipe.learned import read_rule
from moerge.recipe.mergekit import is_mergekit, read_mergekit
from moerge.recipe.nested import Trail, read_file_recipe, take_recipes
from moerge.recipe.schema import DROP, HETEROGENEOUS_KEYS, UNION, MoE, Override, Recipe, routes_sequences
from moerge.recipe.tokens import read_tokenizer_section
from moerge.routers.base import Router, router, routers
from moerge.routers.merged import ROUTERS
from moerge.routers.sequence import FORMAT, SequenceRouter, sequence_router, sequence_routers

_OVERRIDES = ("merge", "overrides")
_SECTIONS = (
    *("base", "experts", "merge", "moe", "calibration", "dtype", "tokenizer", "chat_template", "config", "parts", "learn"),
    *("output", "routers"),
)


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *, seed: int | None = None) -> Recipe:
    """A Recipe from a YAML file's path or from the same structure as a dict; mergekit's files are recipes too.

    `seed` replaces every seed in it. Raises InputError that names the line and key at fault.
    """
    if isinstance(recipe, Recipe):
        if seed is None:
            return recipe
        document, folder = Document(deepcopy(recipe.written), recipe.source), recipe.folder
    elif isinstance(recipe, Mapping):
        document, folder = Document(plain_copy(recipe)), Path()
    else:
        return read_file_recipe(as_path(recipe, "a recipe"), (), partial(_read, seed))
    return _read(seed, document, folder, ())


def _read(seed: int | None, document: Document, folder: Path, trail: Trail) -> Recipe:
    if is_mergekit(document.data):
        return read_mergekit(document, seed=seed)
    if seed is not None:
        _set_seed(document.data, seed)
    sections, recipes = take_recipes(document, folder, trail, partial(_read, seed))
    return _build(document, folder, sections, recipes)


def _set_seed(data: dict[str, Any], seed: int) -> None:
    if isinstance(merge := data.setdefault("merge", {}), dict):
        merge["seed"] = seed
        overrides = merge.get("overrides")
        for override in overrides if isinstance(overrides, list) else ():
            if isinstance(override, dict) and "seed" in override:
                override["seed"] = seed
    if isinstance(moe := data.get("moe"), dict) and isinstance(settings := moe.setdefault("router", {}), dict):
        by_sequence = routes_sequences(moe.get("format"), moe.get("level"))
        kind = settings.get("kind", _default_kind(by_sequence))
        known = sequence_routers() if by_sequence else routers()
        if "seed" in settings or kind not in known or "seed" in _router_class(kind, by_sequence).model_fields:
            settings["seed"] = seed


def _build(document: Document, folder: Path, sections: Mapping[str, Any], recipes: Mapping[str, Recipe]) -> Recipe:
    data = document.data
    for key in data:
        if key not in _SECTIONS:
            raise document.error((str(key),), f": unknown key, {suggest(str(key), _SECTIONS)}", code="unknown-name")
    fields = {key: data[key] for key in _SECTIONS if key in data and key not in ("merge", "moe", "routers")} | {**sections}
    method, overrides, seed = _merge_section(document)
    if isinstance(data.get("tokenizer"), dict):
        section = read_tokenizer_section(document, partial(_model_named, document))
        fields |= {"tokenizer": section.source, "tokens": section.tokens, "pad_to_multiple_of": section.pad_to_multiple_of}
    if data.get("moe") is not None:
        fields["moe"] = _moe_section(document)
    if data.get("routers") is not None:
        fields["routers"] = _routers_section(document)
    whole = {**fields, "method": method, "overrides": overrides, "seed": seed, "folder": folder, "recipes": dict(recipes)}
    recipe = document.build(Recipe, {**whole, "source": document.source, "written": data})
    if isinstance(method, Coefficients):
        recipe = recipe.model_copy(update={"learned": read_rule(method, folder, tuple(recipe.experts))})
    _check(recipe, document)
    return recipe


def _model_named(document: Document, path: Key, written: Any) -> str:
    if not isinstance(written, str):
        raise document.error(path, f" should be a model's name, not {written!r}")
    return written


def _merge_section(document: Document) -> tuple[MergeMethod, tuple[Override, ...], int]:
    section = document.mapping(("merge",), document.data.get("merge"))
    listed = section.pop("overrides", None)
    listed = [] if listed is None else listed
    seed = section.pop("seed", 0)
    if type(seed) is not int:
        raise document.error(("merge", "seed"), f" should be a whole number, not {seed!r}")
    method = _method(document, ("merge",), section, seed)
    if not isinstance(listed, list):
        raise document.error(("merge", "overrides"), " should be a list of mappings with a 'match' each")
    overrides = []
    for index, item in enumerate(listed):
        path: Key = ("merge", "overrides", index)
        own = document.mapping(path, item)
        match = own.pop("match", None)
        if not isinstance(match, str) or not match:
            raise document.error(path, " needs a 'match': a role such as 'attention' or a tensor name with '*'")
        weights = document.mapping((*path, "weights"), own.pop("weights", None))
        dtype = own.pop("dtype", None)
        merged = own if "method" in own else {**section, **own}
        method_here = _method(document, path, merged, seed)
        if isinstance(method_here, Coefficients):
            raise document.error(
                (*path, "method"), ": learned coefficients say themselves which tensors they are for: make them the main method"
            )
        fields = {"match": match, "method": method_here, "weights": weights, "dtype": dtype}
        fields["line"] = document.line((*path, "match"))
        overrides.append(document.build(Override, fields, path))
    return method, tuple(overrides), seed


def _method(document: Document, path: Key, section: Mapping[str, Any], seed: int) -> MergeMethod:
    parameters = dict(section)
    name = parameters.pop("method", "average")
    try:
        kind = merge_method(str(name))
    except InputError as error:
        raise document.error((*path, "method"), f": {error}", code=error.code) from None
    unknown = next((key for key in parameters if key not in kind.model_fields), None)
    if unknown:
        own = ["method", "seed", "overrides"] if path == ("merge",) else ["match", "method", "weights", "dtype"]
        raise document.error(
            (*path, unknown), f": unknown key for {name}, {suggest(unknown, [*kind.model_fields, *own])}", code="unknown-name"
        )
    if "seed" in kind.model_fields:
        parameters.setdefault("seed", seed)
    return document.build(kind, parameters, path)


def _moe_section(document: Document) -> MoE:
    section = document.mapping(("moe",), document.data["moe"])
    parameters = document.mapping(("moe", "router"), section.get("router"))
    by_sequence = routes_sequences(section.get("format"), section.get("level"))
    kind = str(parameters.pop("kind", _default_kind(by_sequence)))
    try:
        chosen = _router_class(kind, by_sequence)
    except InputError as error:
        raise document.error(
            ("moe", "router", "kind"), f": {_other_routing(kind, by_sequence) or error}", code=error.code
        ) from None
    if by_sequence and "top_k" in parameters:
        raise document.error(("moe", "router", "top_k"), ": unknown key, 'top_k' stands beside 'router', in 'moe'")
    section["router"] = document.build(chosen, parameters, ("moe", "router"))
    moe = document.build(MoE, section, ("moe",))
    formats = (*moe_formats(), FORMAT)
    if moe.format not in ("auto", *formats):
        raise document.error(
            ("moe", "format"), f": unknown MoE format {moe.format!r}: {suggest(moe.format, formats)}", code="unknown-name"
        )
    return moe


def _routers_section(document: Document) -> Router:
    """The source of merged mixtures' routers."""
    if document.data.get("moe") is not None:
        raise document.error(("routers",), " is for dense merges of mixtures; a 'moe' section has a 'router' of its own")
    section = document.mapping(("routers",), document.data["routers"])
    kind = str(section.pop("kind", "calibrated"))
    if kind not in ROUTERS:
        problem = f": unknown kind {kind!r}, {suggest(kind, list(ROUTERS))}"
        raise document.error(("routers", "kind"), problem, code="unknown-name")
    if "base" in (kind, section.get("start")) and not document.data.get("base"):
        raise document.error(("routers",), " takes the base's, so the recipe needs a 'base'")
    return document.build(ROUTERS[kind], section, ("routers",))


def _default_kind(by_sequence: bool) -> str:
    return "perplexity" if by_sequence else "random"


def _router_class(kind: str, by_sequence: bool) -> type[Router]:
    return sequence_router(kind) if by_sequence else router(kind)


def _other_routing(kind: str, by_sequence: bool) -> str | None:
    """Return the error for a kind of router that only the other sort of model has."""
    if by_sequence and kind in routers():
        return f"{kind!r} routes tokens and {FORMAT!r} routes sequences: remove 'format', or {suggest(kind, sequence_routers())}"
    if not by_sequence and kind in sequence_routers():
        return f"{kind!r} routes whole sequences, which needs 'format: {FORMAT}'"
    return None


Problems = Iterator[tuple[Key, str]]
"""Keys of a recipe and what is wrong with them."""


def _check(recipe: Recipe, document: Document) -> None:
    """InputError for the first problem of a recipe."""
    for check, code in _CHECKS:
        for key, problem in check(recipe):
            raise document.error(key, problem, code=code)
    if recipe.moe is not None:
        _check_moe(recipe, document)


def _models(recipe: Recipe) -> list[str]:
    return ["base", *recipe.experts] if recipe.base else list(recipe.experts)


def _unknown(name: str, models: Sequence[str]) -> str:
    return f" is not a model of this recipe, {suggest(name, models)}"


def _expert_called_base(recipe: Recipe) -> Problems:
    if "base" in recipe.experts:
        yield ("experts", "base"), ": 'base' is the name of the common ancestor; call this expert something else"


def _conflicts_of_heterogeneous(recipe: Recipe) -> Problems:
    if recipe.moe and recipe.moe.by_sequence and recipe.moe.asks_for_heterogeneous and (conflict := conflicting_key(recipe)):
        yield conflict


def _named_models(recipe: Recipe) -> Problems:
    names = _models(recipe)
    for key, choices in (("tokenizer", [*names, UNION]), ("config", names)):
        named = getattr(recipe, key)
        if named is not None and named not in choices:
            yield (key,), f": {named!r}{_unknown(named, choices)}"
    for text, row in recipe.tokens.items():
        if row.model is not None and row.model not in names:
            yield ("tokenizer", "tokens", text), f": {row.model!r}{_unknown(row.model, names)}"
    for part, owner in recipe.parts.items():
        if owner not in (*names, DROP):
            yield ("parts", part), f": {owner!r}{_unknown(owner, [*names, DROP])}"


def _experts_called_keywords(recipe: Recipe) -> Problems:
    if DROP in recipe.experts and recipe.parts:
        yield ("experts", DROP), f": '{DROP}' in 'parts' leaves a part out; call this expert something else"
    if UNION in recipe.experts and recipe.tokenizer == UNION:
        yield ("experts", UNION), f": 'tokenizer: {UNION}' means the tokens of all models; call this expert something else"


def _owners_of_texts(recipe: Recipe) -> Problems:
    names = _models(recipe)
    weights = recipe.learn.task_weights if recipe.learn else ()
    yield from ((("calibration", name), _unknown(name, names)) for name in recipe.calibration if name not in names)
    yield from ((("learn", "task_weights", name), _unknown(name, names)) for name in weights if name not in names)


def _needs_of_methods(recipe: Recipe) -> Problems:
    for method in recipe.methods:
        try:
            method.check_experts(list(recipe.experts))
        except InputError as error:
            yield ("merge",), f": {error}"
        if method.uses_task_vectors and recipe.base is None:
            needs = f"{method.name} works on task vectors (expert minus base), so the recipe needs a 'base'"
            yield ("merge",), f": {needs}{method.or_without_base}"
        members_base = recipe.includes_base and not method.uses_task_vectors
        weights = [expert.weight for expert in recipe.experts.values()] + [1.0] * members_base
        if method.divides_by_weights and cancel(weights):
            yield ("experts",), ": the weights sum to zero, so they cannot be normalized"


def _passed_through(recipe: Recipe) -> Problems:
    names = _models(recipe)
    overrides = (((*_OVERRIDES, index), override.method) for index, override in enumerate(recipe.overrides))
    for path, method in ((("merge",), recipe.method), *overrides):
        if isinstance(method, Passthrough) and method.model not in names:
            yield (*path, "model"), f": {method.model!r}{_unknown(method.model, names)}"


def _weighed_experts(recipe: Recipe) -> Problems:
    for index, override in enumerate(recipe.overrides):
        for name in override.weights:
            if name not in recipe.experts:
                yield (*_OVERRIDES, index, "weights", name), f" is not an expert, {suggest(name, recipe.experts)}"


def _weights_of_overrides(recipe: Recipe) -> Problems:
    for index, override in enumerate(recipe.overrides):
        if override.weights and not override.method.uses_weights:
            path: Key = (*_OVERRIDES, index, "weights")
            yield path, f" have no effect on {override.method.name}, which ignores them: remove them"


def _ignored_weights(recipe: Recipe) -> Problems:
    weighted = [name for name, expert in recipe.experts.items() if expert.weight != 1]
    if weighted and not any(method.uses_weights for method in recipe.methods):
        ignored = f" has a weight, which {recipe.method.name} ignores: use 'linear', or remove it"
        yield ("experts", weighted[0]), ignored


_CHECKS: tuple[tuple[Callable[[Recipe], Problems], Code | None], ...] = (
    (_expert_called_base, None),
    (_conflicts_of_heterogeneous, None),
    (_named_models, "unknown-name"),
    (_experts_called_keywords, None),
    (_owners_of_texts, "unknown-name"),
    (_needs_of_methods, None),
    (_passed_through, "unknown-name"),
    (_weighed_experts, "unknown-name"),
    (_weights_of_overrides, None),
    (_ignored_weights, None),
)
"""Checks of a recipe, and the code of their errors."""


def _check_moe(recipe: Recipe, document: Document) -> None:
    assert recipe.moe is not None
    if recipe.includes_base and recipe.base is None:
        raise document.error(("moe", "include_base"), " is true, so the recipe needs a 'base'")
    count = len(recipe.experts) + recipe.includes_base
    whole = recipe.moe.by_sequence and recipe.moe.asks_for_heterogeneous
    if count < 2 and not whole:
        raise document.error(("experts",), ": a MoE needs at least two experts")
    if recipe.moe.top_k > count and not (whole and "top_k" not in recipe.moe.model_fields_set):
        raise document.error(("moe", "top_k"), f" is {recipe.moe.top_k}, but there are only {count} experts")
    if isinstance(recipe.moe.router, SequenceRouter):
        _check_by_sequence(recipe.moe, recipe.moe.router, recipe.expert_names, document)
        _refuse_keys(recipe.moe, _TOKEN_KEYS, " is for models that route tokens: add 'level: token', or remove it", document)
        if recipe.moe.adapters == "keep":
            _check_kept_adapters(recipe.moe, recipe.base, document)
    else:
        if recipe.moe.level == "sequence":
            raise document.error(("moe", "level"), f": native formats route tokens: use 'format: {FORMAT}', or remove 'level'")
        _check_by_token(recipe.moe, document)
        _check_shared(recipe, recipe.moe, document)


_TOKEN_KEYS = ("shared", "shared_weight", "layers")
"""Keys of `moe` that are for models that route tokens."""


def _refuse_keys(moe: MoE, keys: Sequence[str], why: str, document: Document) -> None:
    for key in keys:
        if key in moe.model_fields_set:
            raise document.error(("moe", key), why)


def _check_shared(recipe: Recipe, moe: MoE, document: Document) -> None:
    if moe.shared is None:
        _refuse_keys(moe, ("shared_weight",), " has no effect without 'shared': remove it", document)
    models = [*(["base"] if recipe.base else []), *recipe.experts]
    if moe.shared is not None and moe.shared not in models:
        message = f": {moe.shared!r} is no model of this recipe, {suggest(moe.shared, models)}"
        raise document.error(("moe", "shared"), message, code="unknown-name")


def _check_by_token(moe: MoE, document: Document) -> None:
    other = next((index for index, role in enumerate(moe.separate) if role != "ffn"), None)
    if other is not None:
        message = f": token-routed models keep only 'ffn' separate, not {moe.separate[other]!r}: use 'format: {FORMAT}'"
        raise document.error(("moe", "separate", other), message)
    why = f" is for models that route whole sequences: use 'format: {FORMAT}', or remove it"
    _refuse_keys(moe, ("mix", "adapters", *HETEROGENEOUS_KEYS), why, document)


def _check_kept_adapters(moe: MoE, base: str | None, document: Document) -> None:
    if base is None:
        raise document.error(("moe", "adapters"), ": keep needs a 'base', the model that the adapters were trained on")
    other = next((index for index, role in enumerate(moe.separate) if role not in ADAPTED_ROLES), None)
    if other is not None:
        able = " and ".join(ADAPTED_ROLES)
        message = f": only {able} can be kept as adapters, not {moe.separate[other]!r}: remove it, or 'moe.adapters'"
        raise document.error(("moe", "separate", other), message)


def _check_by_sequence(moe: MoE, routing: SequenceRouter, experts: tuple[str, ...], document: Document) -> None:
    if not routing.scores and "top_k" in moe.model_fields_set:
        raise document.error(("moe", "top_k"), f" has no effect on {routing.kind!r} routing: remove it")
    problem = routing.problem(experts, moe.separate)
    if problem:
        raise document.error(("moe", "router", problem[0]), problem[1])
