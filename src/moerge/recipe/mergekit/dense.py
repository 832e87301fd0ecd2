"""mergekit's merges: `models` or `slices`, and the parameters of their tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moerge.errors import suggest
from moerge.recipe.document import Document, Key, short
from moerge.recipe.mergekit.common import (
    check_keys,
    listed,
    read_chat_template,
    read_dtype,
    read_seed,
    read_tokenizer,
    roster_models,
)
from moerge.recipe.mergekit.methods import METHODS, Foreign
from moerge.recipe.mergekit.models import Reference, Roster, read_reference
from moerge.recipe.mergekit.parameters import Setting, Settings, read_setting
from moerge.recipe.mergekit.rule import MergekitRule, Part, Source
from moerge.recipe.schema import Recipe

_KEYS = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "random_seed"),
    *("tokenizer_source", "tokenizer", "chat_template", "documents"),
)
_SOURCE_KEYS = ("model", "layer_range", "parameters")
Found = tuple[Reference, Source]


def read_merge(document: Document, trail: tuple[str, ...] = ()) -> Recipe:
    """The recipe that a file for `mergekit-yaml` amounts to, or the unnamed document of one for `mergekit-multi`.

    `trail` names the documents that the result of this one is a model of.
    """
    data = document.data
    check_keys(document, (), data, _KEYS)
    name, foreign = _method(document)
    base = read_reference(document, ("base_model",), data["base_model"]) if data.get("base_model") is not None else None
    reader = _Reader(document, name, foreign, base, Roster(), [])
    settings = reader.settings(("parameters",), data.get("parameters"), shared=True)
    parts = reader.parts()
    rule = MergekitRule(name, foreign, parts, settings, read_seed(document), document)
    models = roster_models(reader.roster, base, named_base=reader.base_name)
    donor = reader.base_name or next(iter(models["experts"]), "base")
    known = {name: model for reference, model in reader.roster.names.items() for name in (str(reference), model)}
    known |= {"base": donor} | ({str(base): donor} if base else {})
    tokenizer = read_tokenizer(document, known)
    whole: dict[str, Any] = {
        **models,
        "recipes": _recipes(document, models, trail),
        "method": rule.methods[0],
        "settings": rule,
        "slices": _slices(parts),
        "dtype": read_dtype(document),
        "tokenizer": tokenizer.source,
        "tokens": tokenizer.tokens,
        "pad_to_multiple_of": tokenizer.pad_to_multiple_of,
        "chat_template": read_chat_template(document, reader.warnings),
        "config": donor,
        "source": document.source,
        "written": data,
        "notes": (_understood(name, parts), *_rounding(document, name)),
        "warnings": (*reader.warnings, *_differences(name, foreign, parts, settings)),
    }
    return document.build(Recipe, whole)


def _recipes(document: Document, models: Mapping[str, Any], trail: tuple[str, ...]) -> dict[str, Recipe]:
    """The models that are other documents of the file, by their names here."""
    others = document.mapping(("documents",), document.data.get("documents"))
    locations = {name: expert["model"] for name, expert in models["experts"].items()} | {"base": models.get("base")}
    found = {}
    for name, location in locations.items():
        if location not in others:
            continue
        if location in trail:
            around = " -> ".join((*trail[trail.index(location) :], location))
            raise document.error(("documents", location), f" is one of its own models ({around}): name another one there")
        path: Key = ("documents", location)
        inner = {**document.mapping(path, others[location]), "documents": others}
        lines = {key[2:]: line for key, line in document.lines.items() if key[:2] == path and key != path}
        lines |= {key: line for key, line in document.lines.items() if key[:1] == ("documents",)}
        seeds = {key: document.data[key] for key in ("random_seed",) if key in document.data}
        found[name] = read_merge(Document({**seeds, **inner}, document.source, lines), (*trail, location))
    return found


def _method(document: Document) -> tuple[str, Foreign]:
    name = document.data.get("merge_method")
    if name is None:
        raise document.error(("merge_method",), " is missing: name one, such as 'merge_method: ties'")
    if not isinstance(name, str) or name not in METHODS:
        has = ", ".join(sorted(METHODS))
        raise document.error(("merge_method",), f": moerge does not have {short(name)}; of mergekit's methods it has {has}")
    return name, METHODS[name]


@dataclass(frozen=True)
class _Reader:
    """Reads one file."""

    document: Document
    method: str
    foreign: Foreign
    base: Reference | None
    roster: Roster
    warnings: list[str]

    @property
    def base_name(self) -> str | None:
        """Return the base's name: "base" where it is the ancestor alone, its own name where it is merged too."""
        return None if self.base is None else self.roster.names.get(self.base, "base")

    def parts(self) -> tuple[Part, ...]:
        """The slices, or the models as one."""
        data = self.document.data
        given = [key for key in ("models", "slices", "modules") if data.get(key) is not None]
        if not given:
            raise self.document.error(("models",), " is missing: list what is merged there, or in 'slices'")
        if len(given) > 1:
            raise self.document.error((given[1],), f": there are {given[0]!r} already: remove one of the two")
        if given == ["modules"]:
            return self._modules(self.document.mapping(("modules",), data["modules"]))
        if given == ["models"]:
            return (self._models(("models",), data["models"], {}),)
        return self._slices(("slices",), data["slices"])

    def _modules(self, written: Mapping[str, Any]) -> tuple[Part, ...]:
        """Models, and their parameters, for each part of the model; of an only one they may be slices."""
        found: list[Part] = []
        for name, item in written.items():
            path: Key = ("modules", name)
            section = self.document.mapping(path, item)
            check_keys(self.document, path, section, ("name", "models", "slices", "parameters"))
            settings = self.settings((*path, "parameters"), section.get("parameters"), shared=True)
            if section.get("slices") is None:
                found.append(replace(self._models((*path, "models"), section.get("models"), settings), module=name))
            elif section.get("models") is not None or len(written) > 1:
                raise self.document.error(
                    (*path, "slices"), " are for a model of one module, without 'models': remove one of the two"
                )
            else:
                found += [replace(part, wider=settings) for part in self._slices((*path, "slices"), section["slices"])]
        if not found:
            raise self.document.error(("modules",), " is empty: name the parts of the model there, each with its 'models'")
        return tuple(found)

    def _slices(self, path: Key, written: Any) -> tuple[Part, ...]:
        return tuple(self._slice((*path, index), item) for index, item in enumerate(listed(self.document, path, written)))

    def _models(self, path: Key, written: Any, settings: Settings) -> Part:
        """The models, with the base among them, as mergekit adds it."""
        items = enumerate(listed(self.document, path, written))
        found = [self._source((*path, index), item, ("model", "parameters")) for index, item in items]
        if self.base is not None and all(reference != self.base for reference, _ in found):
            found.append((self.base, Source("", None, {}, ("base_model",))))
        return self._part(() if path == ("models",) else path, found, settings, self.base)

    def _slice(self, path: Key, written: Any) -> Part:
        section = self.document.mapping(path, written)
        check_keys(self.document, path, section, ("sources", "base_model", "residual_weight", "parameters"))
        if section.get("residual_weight") is not None:
            self.warnings.append("'residual_weight' has no effect, as in mergekit")
        own = section.get("base_model")
        base = self.base if own is None else read_reference(self.document, (*path, "base_model"), own)
        items = enumerate(listed(self.document, (*path, "sources"), section.get("sources")))
        found = [self._source((*path, "sources", index), item, _SOURCE_KEYS) for index, item in items]
        lengths = {layers[1] - layers[0] for _, source in found if (layers := source.layers)}
        if len(lengths) > 1:
            raise self.document.error(path, " takes different numbers of layers from its sources: they are merged one by one")
        settings = self.settings((*path, "parameters"), section.get("parameters"), shared=True)
        return self._part(path, found, settings, base)

    def _part(self, path: Key, found: Sequence[Found], settings: Settings, base: Reference | None) -> Part:
        self._check_sources(path, found, base)
        if self.method == "slerp":  # t = 0 is the base
            found = sorted(found, key=lambda item: item[0] != base)
        apart = self.foreign.task_vectors and base == self.base
        names = {reference: "base" if apart and reference == base else self.roster.name(reference) for reference, _ in found}
        sources = tuple(Source(names[r], source.layers, source.settings, source.path) for r, source in found)
        return Part(sources, settings, names[base] if self.foreign.task_vectors and base is not None else None)

    def _check_sources(self, path: Key, found: Sequence[Found], base: Reference | None) -> None:
        references = [reference for reference, _ in found]
        twice = next((source for i, (reference, source) in enumerate(found) if reference in references[:i]), None)
        if twice is not None:
            raise self.document.error(twice.path, ": this model stands here twice: remove one")
        if self.foreign.needs_base and base not in references:
            lacks = "name one with 'base_model'" if base is None else f"list {base} among the sources"
            raise self.document.error(path or ("merge_method",), f": {self.method} needs a base: {lacks}")
        fewest, most = self.foreign.count
        if not fewest <= len(found) <= (most or len(found)):
            count = f"exactly {fewest}" if fewest == most else f"{fewest} to {most}" if most else f"at least {fewest}"
            listed_ones = ", ".join(str(reference) for reference in references)
            raise self.document.error(path or ("models",), f": {self.method} takes {count}, not {len(found)} ({listed_ones})")

    def _source(self, path: Key, written: Any, keys: Sequence[str]) -> Found:
        section = self.document.mapping(path, written)
        check_keys(self.document, path, section, keys)
        if "model" not in section:
            raise self.document.error(path, " needs a 'model'")
        reference = read_reference(self.document, (*path, "model"), section["model"])
        layers = self._range(path, section) if "layer_range" in keys else None
        settings = self.settings((*path, "parameters"), section.get("parameters"), shared=False)
        return reference, Source("", layers, settings, path)

    def _range(self, path: Key, section: Mapping[str, Any]) -> tuple[int, int]:
        written = section.get("layer_range")
        if isinstance(written, list) and len(written) == 2:
            start, stop = written
            if type(start) is int and type(stop) is int and 0 <= start < stop:
                return start, stop
        message = f" should be the first layer and the one after the last, such as [0, 16], not {short(written)}"
        raise self.document.error((*path, "layer_range"), message)

    def settings(self, path: Key, written: Any, *, shared: bool) -> dict[str, Setting]:
        """A `parameters` section. One of a single model cannot set what the models share: mergekit does not look there."""
        found = {}
        for key, value in self.document.mapping(path, written).items():
            parameter = self.foreign.parameters.get(key)
            if parameter is None or not (shared or parameter.each):
                self._without_effect((*path, key), key)
            elif value is not None:
                found[key] = read_setting(self.document, (*path, key), value, parameter.kind)
                values = {value for _, listed_ones in found[key].entries for value in listed_ones}
                if parameter.fixed and values - {parameter.default}:
                    raise self.document.error((*path, key), f" is not available for {self.method}: {parameter.fixed}")
        return found

    def _without_effect(self, path: Key, key: str) -> None:
        known = {name for foreign in METHODS.values() for name in foreign.parameters}
        if key not in known:
            raise self.document.error(path, f": unknown parameter, {suggest(key, known)}", code="unknown-name")
        where = ": it belongs into the file's own 'parameters'" if key in self.foreign.parameters else ""
        warning = f"{key!r} has no effect on {self.method} here, as in mergekit{where}"
        if warning not in self.warnings:
            self.warnings.append(warning)


def _slices(parts: Sequence[Part]) -> list[dict[str, Any]]:
    found = []
    for part in parts:
        spans = [(source.model, *source.layers) for source in part.sources if source.layers]
        if spans:
            sources = [{"model": model, "start": start, "stop": stop} for model, start, stop in spans]
            found.append({"base": part.base, "sources": sources})
    return found


def _differences(name: str, foreign: Foreign, parts: Sequence[Part], settings: Settings) -> list[str]:
    """Return notes where the result differs from mergekit's on purpose: only where a parameter that matters is set."""
    scopes = [settings, *(part.settings for part in parts), *(source.settings for part in parts for source in part.sources)]
    used = {key for scope in scopes for key, setting in scope.items() if any(set(v) - {0, 1} for _, v in setting.entries)}
    return [
        f"differs from mergekit: {text.format(method=name)}" for key, text in foreign.differs.items() if not key or key in used
    ]


def _rounding(document: Document, name: str) -> list[str]:
    computed = str(document.data.get("dtype") or "float32").removeprefix("torch.")
    if name in ("passthrough", "linear", "slerp") or computed in ("float32", "float64"):  # these it computes as we do
        return []
    return [f"computed in float32 and rounded once; mergekit computes in {computed}, as 'dtype' says, and rounds at every step"]


def _understood(name: str, parts: Sequence[Part]) -> str:
    models = list(dict.fromkeys(source.model for part in parts for source in part.merged))
    base = next((part.base for part in parts if part.base), None)
    layers = [source.layers for part in parts for source in part.sources[:1] if source.layers]
    slices = f"{len(parts)} slices" if len(parts) > 1 else "1 slice"
    stacked = f", {sum(stop - start for start, stop in layers)} layers from {slices}" if layers else ""
    return f"a mergekit file: {name} of {', '.join(models)}{f' on {base}' if base else ''}{stacked}"
