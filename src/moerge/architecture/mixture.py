"""One expert of a native mixture as a model of its own: its config, and where its tensors lie in the mixture's.

Where dense experts map to the mixture's format exactly, the way back is exact too, and the expert is a dense model. Elsewhere
(OLMoE, which no dense architecture computes, or a shared expert) it is a mixture of one expert, whose weight is always 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from moerge.architecture.config import changed, differences, normalized_config
from moerge.architecture.family import ExpectedTensor, Family, expected_tensors
from moerge.architecture.moe_format import MoEFormat, native_config
from moerge.architecture.registry import FAMILIES, MOE_FORMATS

_ROUTER = re.compile(r"layers\.\d+\.router(\..+)?")
_COUNT, _CHOSEN = "num_local_experts", "num_experts_per_tok"
_ROUTING = frozenset({_CHOSEN, "norm_topk_prob"})
"""Keys that mean nothing for one expert."""
_DTYPES = ("torch_dtype", "dtype")


@dataclass(frozen=True)
class Piece:
    """A tensor `name` of an expert's model: the elements of the mixture's tensor `stored` from `start` on."""

    name: str
    shape: tuple[int, ...]
    stored: str
    start: int = 0


@dataclass(frozen=True)
class ExpertLayout:
    """An expert's config and tensors, and its `rows` of what the router has for every expert, by role."""

    config: dict[str, Any]
    pieces: tuple[Piece, ...]
    rows: Mapping[str, Piece]


def expert_count(family: Family | None, config: Mapping[str, Any]) -> int:
    """The routed experts of a model with this config.json; 0 if it is no native mixture that moerge knows."""
    if family is None or not any(is_routed(rule.role) for rule in family.tensors):
        return 0
    count = normalized_config(config, family).get(_COUNT)
    return count if type(count) is int and count > 0 else 0


def is_routed(role: str) -> bool:
    """Return whether a role, of a tensor or as a family's table has it, is the router's."""
    return bool(_ROUTER.fullmatch(role.replace("{layer}", "0")))


def with_experts(config: Mapping[str, Any], family: Family, experts: int, top_k: int) -> dict[str, Any]:
    """The config.json of a mixture with other numbers of experts, and nothing else changed."""
    known = (_COUNT, *(key for key, own in family.keys.items() if own == _COUNT))
    nested = config.get(family.nested) if family.nested else None
    has = [key for key in known if key in config or (isinstance(nested, Mapping) and key in nested)]
    return changed(config, family, {**dict.fromkeys(has or known[-1:], experts), _CHOSEN: top_k})


def expert_layout(
    family: Family, config: Mapping[str, Any], number: int, *, dense_types: tuple[str, ...] = (), built: bool = False
) -> ExpertLayout:
    """Lay out expert `number` of a mixture of this family.

    Args:
        family: The mixture's, with the names that its checkpoint has.
        config: Its config.json.
        number: The expert's, from 0.
        dense_types: Model types to prefer where several map to the mixture exactly.
        built: True where a shared expert is known to be zero.

    Returns:
        The expert's config and tensors.

    Raises:
        ValueError: The config lacks a size or garbles it.
    """
    known = normalized_config(config, family)
    own, config_of_one = _dense(family, known, dense_types, built) or (family, with_experts(config, family, 1, 1))
    config_of_one |= {key: config[key] for key in _DTYPES if key in config}
    wanted = {tensor.role: tensor for tensor in expected_tensors(own, normalized_config(config_of_one, own))}
    every = {role: piece for tensor in expected_tensors(family, known) for role, piece in _pieces(tensor, number, known, wanted)}
    rows = {role: piece for role, piece in every.items() if is_routed(role)}
    return ExpertLayout(config_of_one, tuple(every[role] for role in wanted), rows)


def _pieces(
    tensor: ExpectedTensor, number: int, config: Mapping[str, Any], wanted: Mapping[str, ExpectedTensor]
) -> Iterator[tuple[str, Piece]]:
    """The roles that a tensor of the mixture, or a part of it, may have in an expert's model."""
    if tensor.expert is not None:
        for role in (tensor.dense_role, tensor.role.replace(f".ffn.{number}.", ".ffn.0.")):
            if tensor.expert == number and role in wanted:
                yield role, Piece(wanted[role].name, tensor.shape, tensor.name)
    elif not tensor.parts and not is_routed(tensor.role):
        name = wanted[tensor.role].name if tensor.role in wanted else tensor.name
        yield tensor.role, Piece(name, tensor.shape, tensor.name)
    else:
        yield from _of_all(tensor, number, prod(tensor.shape) // config[_COUNT], wanted)


def _of_all(tensor: ExpectedTensor, number: int, size: int, wanted: Mapping[str, ExpectedTensor]) -> Iterator[tuple[str, Piece]]:
    """One expert's part of a tensor of all, `size` elements, as it is and split into what it is made of."""
    yield tensor.role, Piece(tensor.name, (1, *tensor.shape[1:]), tensor.name, number * size)
    start = number * size
    for role in tensor.parts:
        if role in wanted:
            yield role, Piece(wanted[role].name, wanted[role].shape, tensor.name, start)
            start += prod(wanted[role].shape)


def _dense(
    family: Family, config: Mapping[str, Any], preferred: tuple[str, ...], built: bool
) -> tuple[Family, dict[str, Any]] | None:
    """The dense family whose model computes what the mixture does if it had this expert alone, and that model's config."""
    formats = [MOE_FORMATS.get(name) for name in MOE_FORMATS.names()]
    for moe in (known for known in formats if known.family.tensors and known.family.model_type == family.model_type):
        if moe.zero_roles and not built:
            continue
        types = sorted(moe.sources, key=lambda name: (name not in preferred, name in moe.fallback_for, name))
        for dense in (FAMILIES.get(name) for name in types):
            made = _dense_config(dense, family, config)
            if _maps_back(moe, dense, made, config):
                return dense, made
    return None


def _dense_config(dense: Family, family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    width = config.get(family.sizes.get("moe_intermediate", "intermediate_size"))
    own = {key: config[key] for key in (*dense.defaults, "layer_types", "num_key_value_heads") if key in config}
    return native_config(dense, {**config, "intermediate_size": width}, **own)


def _maps_back(moe: MoEFormat, dense: Family, config: Mapping[str, Any], mixture: Mapping[str, Any]) -> bool:
    """Return whether the mixture's config is that of experts with this config, but for what means nothing for one expert."""
    known = normalized_config(config, dense)
    if moe.unsupported_reason(known):
        return False
    back = normalized_config(moe.convert(known, mixture[_COUNT], mixture.get(_CHOSEN) or 1), moe.family)
    if not all(mixture.get("moe_layers", ())) and mixture.get("intermediate_size") != known.get("intermediate_size"):
        return False  # its layers without experts are of another width
    apart = _ROUTING | {"moe_layers"} | ({"intermediate_size"} if moe.family.sizes else set())
    return not differences({"mixture": mixture, "back": back}).keys() - apart
