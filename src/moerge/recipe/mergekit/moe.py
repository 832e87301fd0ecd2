"""mergekit-moe's files: experts with prompts, on the attention and norms of a base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge.methods.average import Linear
from moerge.methods.noise import Noise
from moerge.methods.passthrough import Passthrough
from moerge.recipe.document import Document, Key, short
from moerge.recipe.mergekit.common import check_keys, listed, read_dtype, read_seed
from moerge.recipe.mergekit.models import Reference, fresh_name, read_reference
from moerge.recipe.schema import Recipe
from moerge.routers.base import Router, router

_KEYS = ("base_model", "gate_mode", "dtype", "experts_per_token", "experts", "shared_experts", "architecture", "random_seed")
_EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale")
_ADDS = "ffn.down"
_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random")
_FORMATS = {"mixtral": "mixtral", "qwen": "qwen2_moe", "qwen moe": "qwen2_moe", "qwen3": "qwen3_moe", "qwen3 moe": "qwen3_moe"}
_HIDDEN = (
    "differs from mergekit: hidden states are what the result's routers see, after the norm behind attention, each prompt on its "
    "own expert's path; mergekit takes the base's residual before attention"
)
_RANDOM = (
    "differs from mergekit: random gates have the standard deviation of a fresh linear layer, 1 / sqrt(3 * hidden_size); "
    "mergekit's 'random' has 1, which makes its router choose at random but firmly"
)


def read_moe(document: Document) -> Recipe:
    """The recipe that a file for `mergekit-moe` amounts to."""
    data = document.data
    check_keys(document, (), data, _KEYS)
    if data.get("base_model") is None:
        raise document.error(("base_model",), " is missing: name the model whose attention, norms and embeddings are taken")
    base = read_reference(document, ("base_model",), data["base_model"])
    if data.get("shared_experts"):
        raise document.error(
            ("shared_experts",), " are not supported: 'moe.shared' of a recipe of moerge's own has an expert that is shared"
        )
    experts, prompts, recipes = _experts(document, base)
    chosen, warnings = _router(document, prompts)
    top_k = data.get("experts_per_token", 2)
    if type(top_k) is not int or not 1 <= top_k <= len(experts):
        raise document.error(
            ("experts_per_token",), f" should be from 1 to {len(experts)}, the number of experts, not {short(top_k)}"
        )
    whole: dict[str, Any] = {
        "base": base.model,
        "base_adapter": base.adapter,
        "experts": experts,
        "recipes": recipes,
        "method": Passthrough(model="base"),
        "moe": {"include_base": False, "top_k": top_k, "router": chosen, "format": _format(document)},
        "dtype": read_dtype(document),
        "source": document.source,
        "written": data,
        "notes": (f"a mergekit-moe file: experts {', '.join(experts)} on the attention and norms of base",),
        "warnings": tuple(warnings),
    }
    return document.build(Recipe, whole)


def _experts(document: Document, base: Reference) -> tuple[dict[str, Any], dict[str, Any], dict[str, Recipe]]:
    """Our experts by name, their prompts where they have some, and the recipes that they are."""
    experts: dict[str, Any] = {}
    prompts = {}
    recipes: dict[str, Recipe] = {}
    for index, item in enumerate(listed(document, ("experts",))):
        path: Key = ("experts", index)
        section = document.mapping(path, item)
        check_keys(document, path, section, _EXPERT_KEYS)
        if "source_model" not in section:
            raise document.error(path, " needs a 'source_model'")
        reference = read_reference(document, (*path, "source_model"), section["source_model"])
        name = fresh_name(reference, experts)
        on_base = reference.adapter and not base.adapter and reference.model == base.model
        experts[name] = {"model": reference.adapter} if on_base else {"model": reference.model, "adapter": reference.adapter}
        changed = _changed(document, path, section, name, reference)
        if changed is not None:
            recipes[name], experts[name] = changed, {"model": str(reference)}
        kinds = ("positive", "negative")
        prompts[name] = {kind: _texts(document, (*path, f"{kind}_prompts"), section.get(f"{kind}_prompts")) for kind in kinds}
    if len(experts) < 2:
        raise document.error(("experts",), ": a MoE needs at least two experts")
    return experts, prompts, recipes


def _changed(document: Document, path: Key, section: Mapping[str, Any], name: str, reference: Reference) -> Recipe | None:
    """The recipe of an expert with noise, or whose feed-forward layers add so many times as much to the residual stream."""
    changed: Recipe | None = None
    model: dict[str, Any] = {"model": reference.model, "adapter": reference.adapter}
    noise, scale = (_number(document, (*path, key), section.get(key)) for key in ("noise_scale", "residual_scale"))
    if noise:
        if noise < 0:
            raise document.error((*path, "noise_scale"), f" should not be negative, but it is {noise}")
        written = {"method": "noise", "scale": noise, "seed": read_seed(document)}
        changed = _of_one(document, name, model, None, written, method=Noise(scale=noise, seed=read_seed(document)))
    if scale is not None:
        method, weights = Linear(normalize=False), {name: scale}
        written = {"method": "linear", "normalize": False, "overrides": [{"match": _ADDS, "weights": weights}]}
        overrides = [{"match": _ADDS, "method": method, "weights": weights}]
        changed = _of_one(document, name, model, changed, written, method=method, overrides=overrides)
    return changed


def _of_one(
    document: Document, name: str, model: dict[str, Any], inner: Recipe | None, merge: dict[str, Any], **fields: Any
) -> Recipe:
    """A recipe of one model, or of one that is a recipe itself."""
    expert = model if inner is None else {"model": f"{name} with noise"}
    written = {"experts": {name: model if inner is None else inner.written}, "merge": merge, "dtype": "float32"}
    whole = {"experts": {name: expert}, "recipes": {} if inner is None else {name: inner}, "dtype": "float32", **fields}
    return document.build(Recipe, {**whole, "source": document.source, "written": written})


def _number(document: Document, path: Key, written: Any) -> float | None:
    if written is not None and (isinstance(written, bool) or not isinstance(written, int | float)):
        raise document.error(path, f" should be a number, not {short(written)}")
    return None if written is None else float(written)


def _texts(document: Document, path: Key, written: Any) -> list[str]:
    if written is None:
        return []
    if not isinstance(written, list) or not all(isinstance(text, str) for text in written):
        raise document.error(path, f" should be a list of texts, not {short(written)}")
    return [text for text in written if text.strip()]


def _router(document: Document, prompts: dict[str, dict[str, list[str]]]) -> tuple[Router, list[str]]:
    mode = document.data.get("gate_mode", "hidden")
    if mode not in _MODES:
        raise document.error(("gate_mode",), f" should be one of {', '.join(_MODES)}, not {short(mode)}")
    if mode in ("random", "uniform_random"):
        settings: dict[str, Any] = {"seed": read_seed(document)}
        return document.build(router("random"), settings), [_RANDOM] if mode == "random" else []
    for index, (name, given) in enumerate(prompts.items()):
        if not given["positive"]:
            raise document.error(("experts", index), f": {name} needs 'positive_prompts', of which '{mode}' gates are made")
    first, *others = prompts.values()
    if all(given == first for given in others):
        raise document.error(("experts",), " all have the same prompts, by which no router can tell them apart")
    settings = {"prompts": prompts}
    if mode == "cheap_embed":
        return document.build(router("embedding"), settings), []
    pool = "mean" if mode == "hidden_avg" else "last"
    return document.build(router("hidden"), {**settings, "negative": "none", "pool": pool}), [_HIDDEN]


def _format(document: Document) -> str:
    written = document.data.get("architecture")
    if written is None:
        return "auto"
    known = _FORMATS.get(str(written).lower())
    if known is None:
        raise document.error(("architecture",), f" should be one of {', '.join(_FORMATS)}, not {short(written)}")
    return known
