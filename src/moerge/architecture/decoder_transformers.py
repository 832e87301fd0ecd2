"""The embedding and head of a causal language model as transformers has them: read from a model that has shapes but no values."""

# mypy: allow-untyped-calls

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moerge.architecture.decoder import DecoderInterface, not_decoder
from moerge.architecture.family import ExpectedTensor
from moerge.errors import InputError
from moerge.extras import require
from moerge.quiet import without_warnings

_SAMPLE = 3
"""Logits that are looked at to see what a model does to them."""


def decoder_from_transformers(config: Mapping[str, Any], where: str) -> DecoderInterface:
    """See `decoder_interface`."""
    kind = str(config["model_type"])
    require("models", f"{where}: moerge does not know models of type {kind!r}, and asking transformers")
    import torch
    import transformers

    with without_warnings():
        return _ask(transformers, torch, config, kind, where)


def _ask(transformers: Any, torch: Any, config: Mapping[str, Any], kind: str, where: str) -> DecoderInterface:
    settings = _settings(config, where, kind, transformers)
    mapping = transformers.models.auto.modeling_auto
    if getattr(settings, "is_encoder_decoder", False):
        raise not_decoder(where, kind, "an encoder-decoder")
    if kind not in mapping.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise not_decoder(where, kind, "no language model of transformers")
    if kind in mapping.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(settings, "is_decoder", False):
        raise not_decoder(where, kind, "an encoder")
    if getattr(settings.get_text_config(), "hidden_size_per_layer_input", 0):
        raise InputError(f"{where}: models of type {kind!r} read the tokens again in every layer, so they cannot be experts")
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # whatever a config that fits no model makes its code raise
        raise InputError(f"{where}: config.json: transformers cannot make a {kind} model of it: {_short(error)}") from None
    return _look(model, kind, where)


def _settings(config: Mapping[str, Any], where: str, kind: str, transformers: Any) -> Any:
    if kind not in transformers.CONFIG_MAPPING:
        if config.get("auto_map"):
            raise InputError(
                f"{where}: models of type {kind!r} run by code of their own ('auto_map' in config.json), which moerge does not "
                "run: only types that transformers itself has can be experts"
            )
        raise InputError(
            f"{where}: neither moerge nor transformers {transformers.__version__} knows models of type {kind!r}: "
            "check config.json, or upgrade transformers"
        )
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map", "torch_dtype", "dtype")}
    try:
        return transformers.AutoConfig.for_model(kind, **values)
    except Exception as error:  # each family's config checks in its own way
        raise InputError(f"{where}: config.json: transformers cannot read it: {_short(error)}") from None


def _look(model: Any, kind: str, where: str) -> DecoderInterface:
    embedding, head = _modules(model)
    if getattr(embedding, "weight", None) is None or embedding.weight.ndim != 2:
        raise InputError(f"{where}: models of type {kind!r} have no input embedding, so they cannot be experts: leave it out")
    if head is None or head.weight.shape != embedding.weight.shape:
        raise InputError(
            f"{where}: models of type {kind!r} have no head of the shape of their input embedding, so they cannot be experts: "
            "leave it out"
        )
    model.tie_weights()
    names = {id(parameter): name for name, parameter in model.named_parameters()}  # of tied ones the first
    first, last = names[id(embedding.weight)], names[id(head.weight)]
    bias = names[id(head.bias)] if getattr(head, "bias", None) is not None else None
    _check_between(model, {first, last, bias}, kind, where)
    kept = {name: value for name, value in model.state_dict(keep_vars=True).items() if names.get(id(value), name) == name}
    rows, width = embedding.weight.shape
    decoder = DecoderInterface(
        kind,
        rows,
        width,
        _stored_name(model, first),
        _stored_name(model, last) if last != first else None,
        tuple(ExpectedTensor("", name, tuple(value.shape)) for name, value in _as_stored(model, kept).items()),
        _stored_name(model, bias) if bias else None,
        _embedding_scale(embedding, kind, where),
        prefix=model.base_model_prefix,
    )
    measured = _around_head(model, decoder.width)  # which takes the model apart
    if measured is None:
        return replace(decoder, head_measured=False)
    return replace(decoder, logit_scale=measured[0], soft_capping=measured[1])


def _modules(model: Any) -> tuple[Any, Any]:
    """Input embedding and head, None where there is none."""
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):
            found.append(None)
    return found[0], found[1]


def _as_stored(model: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by their names on disk, in the layout that they have there."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 stores them as they are in memory
        return dict(values)
    return dict(revert_weight_conversion(model, dict(values)))


def _stored_name(model: Any, name: str) -> str:
    return next(iter(_as_stored(model, {name: dict(model.named_parameters(remove_duplicate=False))[name]})))


def _check_between(model: Any, outside: set[str | None], kind: str, where: str) -> None:
    """Check that whatever is neither embedding nor head lies inside the model whose last hidden states the head reads."""
    inside = f"{model.base_model_prefix}."
    between = next((name for name, _ in model.named_parameters() if name not in outside and not name.startswith(inside)), None)
    if between or not hasattr(model, model.base_model_prefix):
        what = f"such as {between!r}" if between else "which transformers does not tell apart"
        raise InputError(f"{where}: models of type {kind!r} have layers of their own between body and head, {what}: leave it out")


def _embedding_scale(embedding: Any, kind: str, where: str) -> float:
    from torch import nn

    if type(embedding).forward is nn.Embedding.forward:
        return 1.0
    for name in ("scalar_embed_scale", "embed_scale"):
        if isinstance(value := getattr(embedding, name, None), int | float):
            return float(value)
    raise InputError(
        f"{where}: the embedding of models of type {kind!r} is a {type(embedding).__name__}, of which moerge does not know what "
        "it computes: leave it out"
    )


def _around_head(model: Any, width: int) -> tuple[float, float | None] | None:
    """Measure the factor and the limit of the head's outputs, with a body that returns chosen states.

    None where that does not work.
    """
    import torch
    from torch import nn
    from transformers.modeling_outputs import BaseModelOutputWithPast

    head = nn.Linear(width, _SAMPLE, bias=False)
    nn.init.eye_(head.weight)

    class Output(BaseModelOutputWithPast):
        def __getattr__(self, name: str) -> None:  # whatever else a family's body puts out: a cache, the router's logits
            if name.startswith("__"):
                raise AttributeError(name)

    body: Any = getattr(model, model.base_model_prefix)
    factor, found = 1.0, []
    for part in (body, getattr(body, "decoder", body)):  # the part that some models call
        part.forward = lambda *args, **kwargs: Output(last_hidden_state=factor * torch.ones(1, 1, width))
    try:
        model.set_output_embeddings(head)
        with torch.no_grad():
            for factor in (1e-4, 1e4):
                logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits
                found.append(float(logits.flatten()[0]) / factor)
    except Exception:  # every family's code is another, and this is none that it was made for
        return None
    small, large = found
    return round(small, 6), None if abs(large - small) < 1e-3 * abs(small) else 1e4 * large


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
