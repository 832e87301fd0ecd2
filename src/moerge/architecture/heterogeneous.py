"""The tensors of a model that routes sequences between whole models: the experts' own, under `model.experts.N.`, and its own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moerge.architecture.decoder import DecoderInterface
from moerge.architecture.decoder_interface import decoder_interface
from moerge.architecture.family import ExpectedTensor
from moerge.architecture.registry import tabled_family
from moerge.architecture.sequence import GATE
from moerge.errors import InputError

EMBEDDING, HEAD, HEAD_BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
_OF_EXPERT = re.compile(r"model\.experts\.(\d+)\.")


def expert_prefix(number: int) -> str:
    """Return the prefix of the names of an expert's tensors."""
    return f"model.experts.{number}."


def expert_number(name: str) -> int | None:
    """Return the number of the expert that a tensor belongs to; None for tensors outside the experts."""
    match = _OF_EXPERT.match(name)
    return int(match[1]) if match else None


def expert_tensors(
    decoder: DecoderInterface, number: int, *, rows: int | None = None
) -> Iterator[tuple[ExpectedTensor, ExpectedTensor]]:
    """An expert's tensors in the model, each with its own: without embedding and head, or with `rows` of each."""
    outside = {decoder.embedding, decoder.head, decoder.head_bias}
    for tensor in decoder.tensors:
        shape = tensor.shape
        if tensor.name in outside:
            if rows is None:
                continue
            shape = (rows, *shape[1:])
        role = f"experts.{number}.{tensor.role or tensor.name}"
        yield ExpectedTensor(role, expert_prefix(number) + tensor.name, shape, number, tensor.role), tensor


def shared_tensors(rows: int, width: int, *, head_bias: bool) -> tuple[ExpectedTensor, list[ExpectedTensor]]:
    """The shared embedding, and the head."""
    head, bias = ExpectedTensor("head", HEAD, (rows, width)), ExpectedTensor("head.bias", HEAD_BIAS, (rows,))
    return ExpectedTensor("embedding", EMBEDDING, (rows, width)), [head, bias] if head_bias else [head]


def heterogeneous_gate(experts: int, width: int) -> ExpectedTensor:
    """The gate of learned routing, on mean embeddings this wide."""
    return ExpectedTensor("router", GATE, (experts, width), None, "router")


def expected_heterogeneous(config: Mapping[str, Any]) -> list[ExpectedTensor]:
    """Every tensor that a model with this config.json has; of experts whose type nothing here knows, none.

    Raises ValueError if the config lacks something or garbles it.
    """
    decoders, rows, width = _experts(config), config.get("vocab_size"), config.get("hidden_size")
    routing = config.get("routing") or {}
    if type(rows) is not int or type(width) is not int or not isinstance(routing, Mapping):
        raise ValueError("vocab_size and hidden_size should be whole numbers, and routing a mapping")
    separate = config.get("embedding") == "separate"
    known = {n: decoder for n, decoder in enumerate(decoders) if decoder is not None}
    found = [t for n, decoder in known.items() for t, _ in expert_tensors(decoder, n, rows=rows if separate else None)]
    if not separate:
        embedding, head = shared_tensors(rows, width, head_bias=bool(config.get("head_bias")))
        widths = {number: decoder.width for number, decoder in known.items()}
        found = [embedding, *found, *_projectors(config, widths, len(decoders)), *head]
    if routing.get("kind") == "learned" and len(known) == len(decoders):
        found.append(heterogeneous_gate(len(decoders), sum(decoder.width for decoder in known.values()) if separate else width))
    return found


def _projectors(config: Mapping[str, Any], widths: Mapping[int, int], experts: int) -> list[ExpectedTensor]:
    from moerge.architecture.heterogeneous import expected_projectors

    settings = config.get("projectors")
    if not isinstance(settings, Mapping) or type(settings.get("width")) is not int:
        raise ValueError("projectors should be a mapping with a width where the embedding is shared")
    own = [(widths.get(number, 1),) * 2 for number in range(experts)]
    every = expected_projectors({"linear": bool(settings.get("linear")), **settings}, own, config["hidden_size"])
    return [tensor for tensor in every if tensor.expert in widths]


def _experts(config: Mapping[str, Any]) -> Sequence[DecoderInterface | None]:
    configs = config.get("expert_configs")
    if not isinstance(configs, list) or not all(isinstance(own, Mapping) for own in configs):
        raise ValueError("expert_configs should be a list of the experts' config.json")
    return [_known(own, f"expert {number}") for number, own in enumerate(configs)]


def _known(config: Mapping[str, Any], where: str) -> DecoderInterface | None:
    try:
        return decoder_interface(config, where)
    except InputError as error:
        if tabled_family(config) is None:  # only transformers knows it, and perhaps a newer one
            return None
        raise ValueError(error) from None


Kind = Literal["fitted", "random"]


FACTOR = 4
"""How many times as wide as the shared width the MLPs are."""


@dataclass(frozen=True)
class _Part:
    """A tensor of a projector; `inputs` is how many inputs its layer has."""

    tensor: ExpectedTensor
    side: Literal["in", "out"]
    layer: Literal["linear", "up", "down"]
    inputs: int

    @property
    def what(self) -> str:
        """Return the plan's word for it."""
        return f"projector_{self.side}.{self.layer}"


def projector_config(kind: Kind, width: int) -> dict[str, Any]:
    """`projectors` of config.json, given the shared width."""
    return {"linear": kind == "fitted", "width": FACTOR * width}


def expected_projectors(projectors: Mapping[str, Any], widths: Sequence[tuple[int, int]], width: int) -> list[ExpectedTensor]:
    """Every tensor of the projectors, given `projectors` of config.json and the widths of each expert's embedding and head."""
    return [part.tensor for part in _parts(projectors, widths, width)]


def _parts(projectors: Mapping[str, Any], widths: Sequence[tuple[int, int]], width: int) -> Iterator[_Part]:
    for expert, (inner, outer) in enumerate(widths):
        yield from _projector("in", expert, width, inner, projectors)
        yield from _projector("out", expert, outer, width, projectors)


def _projector(
    side: Literal["in", "out"], expert: int, inputs: int, outputs: int, projectors: Mapping[str, Any]
) -> Iterator[_Part]:
    hidden = projectors["width"]
    layers: dict[Literal["linear", "up", "down"], tuple[int, int]] = {"up": (hidden, inputs), "down": (outputs, hidden)}
    if projectors["linear"]:
        layers = {"linear": (outputs, inputs), **layers}
    for layer, shape in layers.items():
        role, dense = f"projector_{side}.{expert}.{layer}", f"projector_{side}.{layer}"
        name = f"model.projectors_{side}.{expert}.{layer}"
        yield _Part(ExpectedTensor(role, f"{name}.weight", shape, expert, dense), side, layer, shape[1])
        yield _Part(ExpectedTensor(f"{role}.bias", f"{name}.bias", shape[:1], expert, f"{dense}.bias"), side, layer, shape[1])
