"""The sequence-routed model's tensors: those of its experts' dense family, one for each expert where they are separate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moerge.architecture.family import ExpectedTensor, Family, expected_tensors
from moerge.architecture.registry import read_config
from moerge.modeling.adapters_moerge import FACTORS, Adapted, adapted, check_adapters, factor_name, plain_name
from moerge.modeling.naming_moerge import dense_name, role_of, separate_name

MODEL_TYPE = "moerge"
HETEROGENEOUS = "moerge_heterogeneous"
BY_SEQUENCE = (MODEL_TYPE, HETEROGENEOUS)
"""Our model types that route sequences: of experts of one family, and of whole models."""
GATE = "router.weight"


def expand(dense: Sequence[ExpectedTensor], experts: int, separate: Sequence[str]) -> Iterator[ExpectedTensor]:
    """For each dense tensor, the model's own: one for each expert, with `expert` set, or a shared one.

    Raises ValueError for a tensor that the model has no place for.
    """
    for tensor in dense:
        role = role_of(tensor.name)
        numbers = range(experts) if role in separate else (None,)
        for number in numbers:
            name = separate_name(tensor.name, number or 0)
            yield ExpectedTensor(_role(tensor.role, role, number), name, tensor.shape, number, tensor.role)


def adapter_factors(dense: ExpectedTensor, one: Adapted) -> tuple[ExpectedTensor, ExpectedTensor]:
    """The factors A [rank, in] and B [out, rank] of an expert's adapter on a dense tensor [out, in]."""
    (outputs, inputs), role = dense.shape, role_of(dense.name)
    a, b = (factor_name(dense.name, one.expert, factor) for factor in FACTORS)
    path = _role(dense.role or dense.name, role, one.expert)
    return (
        ExpectedTensor(f"{path}.{FACTORS[0]}", a, (one.rank, inputs), one.expert, dense.role),
        ExpectedTensor(f"{path}.{FACTORS[1]}", b, (outputs, one.rank), one.expert, dense.role),
    )


def gate(experts: int, hidden: int) -> ExpectedTensor:
    """The gate of learned routing."""
    return ExpectedTensor("router", GATE, (experts, hidden), None, "router")


def expected_routed(config: Mapping[str, Any]) -> list[ExpectedTensor]:
    """Every tensor that a sequence-routed model with this config.json has; empty if the experts' family is unknown.

    Raises ValueError if the config lacks something or garbles it.
    """
    family, dense = _experts(config)
    names, separate, routing = config.get("expert_names"), config.get("separate", ["ffn"]), config.get("routing") or {}
    if not isinstance(names, list) or not isinstance(separate, list) or not isinstance(routing, Mapping):
        raise ValueError("expert_names and separate should be lists, and routing a mapping")
    if family is None:
        return []
    plain, adapters = expected_tensors(family, dense), config.get("adapters")
    found = list(expand(plain, len(names), separate if adapters is None else []))
    if adapters is not None:
        check_adapters(adapters, names, separate, dense["num_hidden_layers"])
        by_name = {tensor.name: tensor for tensor in plain}
        found += [factor for one in adapted({**config, "expert_config": dense}) for factor in _factors(by_name, one)]
    return [*found, gate(len(names), dense["hidden_size"])] if routing.get("kind") == "learned" else found


def routed_role(config: Mapping[str, Any], name: str) -> str | None:
    """The role of a sequence-routed model's tensor by its name, or None if it has no such tensor."""
    if name == GATE:
        return "router"
    factor = plain_name(name)
    if factor is not None:
        plain, expert, letter = factor
        shared = routed_role(config, plain)
        return shared and f"{_role(shared, role_of(dense_name(plain)[0]), expert)}.{letter}"
    try:
        dense, number = dense_name(name)
    except ValueError:
        return None
    family, _ = _experts(config)
    role = role_of(dense)
    known = family.role_of(dense) if family else role
    own = role in config.get("separate", ["ffn"]) and config.get("adapters") is None
    return known and _role(known, role, number if own else None)


def expert_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the dense models that a sequence-routed model is made of, or the config itself if it is another model's."""
    return _experts(config)[1] if config.get("model_type") == MODEL_TYPE else config


def _factors(by_name: Mapping[str, ExpectedTensor], one: Adapted) -> tuple[ExpectedTensor, ExpectedTensor]:
    if one.weight not in by_name:
        raise ValueError(f"adapters name {one.module!r}, which the experts do not have")
    return adapter_factors(by_name[one.weight], one)


def _experts(config: Mapping[str, Any]) -> tuple[Family | None, dict[str, Any]]:
    dense = config.get("expert_config")
    if not isinstance(dense, Mapping):
        raise ValueError("expert_config should be the experts' config.json")
    return read_config(dense)


def _role(path: str, role: str, expert: int | None) -> str:
    """`layers.3.ffn.up` of expert 2 is `layers.3.ffn.2.up`, as in token-routed models."""
    parts = path.split(".")
    if expert is None or role not in parts:  # the roles of an unknown family are tensor names
        return path
    place = parts.index(role) + 1
    return ".".join([*parts[:place], str(expert), *parts[place:]])
