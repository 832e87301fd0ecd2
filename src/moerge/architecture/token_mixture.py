"""The table of a dense family's model whose feed-forward modules are mixtures, routed token by token (our own format)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from moerge.architecture.family import Family, TensorRule
from moerge.architecture.sizes import MAX_LAYERS

MODEL_TYPE = "moerge_token"
CLASS = "MoergeTokenForCausalLM"
INNER = "expert_config"
"""The key of the dense model's config."""
_PREFIX = "dense."
"""What the names of the dense model's tensors begin with."""
_FFN = "layers.{layer}.ffn."
_MATRIX = re.compile(r"(gate|up|down|gate_up)(\.bias)?")


def feed_forward_module(family: Family) -> str:
    """Return the name of a layer's feed-forward module, with `{layer}`. ValueError where it cannot be routed."""
    rules = [rule for rule in family.tensors if rule.role.startswith(_FFN)]
    other = next((rule.role for rule in rules if not _MATRIX.fullmatch(rule.role.removeprefix(_FFN))), None)
    if not rules or other:
        has = f"has {other.format(layer='N')!r} in it" if other else "is not known"
        raise ValueError(f"the feed-forward module of a {family.model_type} {has}, and only plain matrices can be routed")
    modules = {rule.name.rsplit(".", 2)[0] for rule in rules}
    module = modules.pop()
    if modules or module.endswith("{layer}"):
        raise ValueError(f"a {family.model_type} has no module of its own for its feed-forward matrices")
    return module


def token_family(config: Mapping[str, Any], family_of: Callable[[Mapping[str, Any]], Family | None]) -> Family | None:
    """The family of a mixture with this config.json, None where its dense family is not known. ValueError if it is garbled."""
    inner = config.get(INNER)
    dense = family_of(inner) if isinstance(inner, Mapping) else None
    if dense is None:
        return None
    names, layers = config.get("expert_names"), config.get("moe_layers")
    if not isinstance(names, list) or not isinstance(layers, list | None) or not isinstance(config.get("feed_forward"), str):
        raise ValueError("expert_names and moe_layers should be lists, and feed_forward a name")

    def derive(known: dict[str, Any]) -> None:
        dense.derive(known)
        known["num_local_experts"] = len(names)

    return replace(
        dense,
        model_type=MODEL_TYPE,
        architecture=CLASS,
        tensors=tuple(rule for own in dense.tensors for rule in _rules(own, config, dense)),
        nested=INNER,
        derive=derive,
        aliases=(),
        buffers=tuple(_PREFIX + pattern for pattern in dense.buffers),
        unmodeled=(),
        fused=(),
        float32=tuple(_PREFIX + pattern for pattern in dense.float32),
    )


def _rules(rule: TensorRule, config: Mapping[str, Any], dense: Family) -> Iterator[TensorRule]:
    """The rows that stand for a row of the dense table: the same with the prefix, or a mixture's in layers that are one."""
    own = replace(rule, name=_PREFIX + rule.name)
    if not rule.role.startswith(_FFN):
        yield own
        return
    every = rule.layers or frozenset(range(MAX_LAYERS))
    chosen = every.intersection(every if config.get("moe_layers") is None else config["moe_layers"])
    if every - chosen:
        yield replace(own, layers=every - chosen)
    own = replace(own, layers=rule.layers if chosen == every else chosen)
    module = _PREFIX + str(config["feed_forward"])
    part = own.name.removeprefix(f"{module}.")
    if rule.role == next(other.role for other in dense.tensors if other.role.startswith(_FFN)):
        yield TensorRule("layers.{layer}.router", f"{module}.router.weight", ("experts", "hidden"), layers=own.layers)
    yield replace(own, name=f"{module}.experts.{part}", shape=("experts", *rule.shape), parts=(rule.role,))
    if config.get("shared_weight") is not None:
        role = rule.role.replace(".ffn.", ".ffn.shared.")
        yield replace(own, name=f"{module}.shared.{part}", role=role)
