"""What a family is: a table of tensors (role, name, shape), read both ways, and the defaults of its config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class TensorRule:
    """One row of a family's table.

    `role` and `name` are templates in `{layer}` and, inside a MoE, `{expert}`. `shape` names dimensions (see
    `dimensions`). `when` names a config key that must be true for the tensor to exist, or "!key" for false.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    when: str = ""

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with this canonical config has the tensor."""
        return not self.when or bool(config.get(self.when.removeprefix("!"))) != self.when.startswith("!")


@dataclass(frozen=True)
class Expected:
    """A tensor that a model of a given config must have. `role` is its path, such as `layers.3.attention.q`."""

    role: str
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    dense_role: str = ""


@dataclass(frozen=True)
class Family:
    """A family of architectures.

    `defaults` are the config values that transformers assumes when config.json omits them; `buffers` match tensors that
    old checkpoints store but no model reads.
    """

    model_type: str
    architecture: str
    tensors: tuple[TensorRule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], TensorRule]]:
        return [(_pattern(rule.name), rule) for rule in self.tensors]

    def role_of(self, name: str) -> str | None:
        """The role path of a tensor by its name, or None if the family has no such tensor."""
        for pattern, rule in self._patterns:
            match = pattern.fullmatch(name)
            if match:
                return rule.role.format(**match.groupdict())
        return None

    def is_buffer(self, name: str) -> bool:
        """Whether a stored tensor can be ignored."""
        return any(re.fullmatch(pattern, name) for pattern in self.buffers)


@dataclass(frozen=True)
class MoEFormat:
    """A native token-routed MoE that dense experts can be assembled into.

    `sources` are the model types that map exactly. `convert(config, experts, top_k)` makes the MoE's config from a dense
    canonical one; `obstacle(config)` says what of a dense config the format cannot express, or None.
    """

    name: str
    family: Family
    sources: frozenset[str]
    convert: Callable[[Mapping[str, Any], int, int], dict[str, Any]]
    obstacle: Callable[[Mapping[str, Any]], str | None]


_MAX_MODULES = 1_000_000
"""More layers times experts than this is a damaged config, which would otherwise fill the memory."""


def dimensions(config: Mapping[str, Any]) -> dict[str, int]:
    """Sizes by the names that tensor rules use, from a canonical config; ValueError names a size that is none."""

    def size(key: str) -> int:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} should be a positive whole number, not {value!r}")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    head_dim, experts = size("head_dim"), size("num_local_experts") if config.get("num_local_experts") else 0
    if size("num_hidden_layers") * max(1, experts) > _MAX_MODULES:
        raise ValueError(f"num_hidden_layers is {config['num_hidden_layers']:,}, which no model has")
    return {
        "vocab": size("vocab_size"),
        "hidden": hidden,
        "intermediate": size("intermediate_size"),
        "q": heads * head_dim,
        "kv": size("num_key_value_heads") * head_dim,
        "experts": experts,
    }


def expected_tensors(family: Family, config: Mapping[str, Any]) -> list[Expected]:
    """Every tensor of a model with this canonical config: what comes first in the model first.

    Raises ValueError if the config lacks a size or garbles it.
    """
    sizes = dimensions(config)
    rules = [rule for rule in family.tensors if rule.applies(config)]
    before = [rule for rule in rules if "{layer}" not in rule.role and rule.role == "embedding"]
    after = [rule for rule in rules if "{layer}" not in rule.role and rule.role != "embedding"]
    layered = [rule for rule in rules if "{layer}" in rule.role]
    found = [next(_instances(rule, {}, sizes)) for rule in before]
    for layer in range(int(config["num_hidden_layers"])):
        found += [tensor for rule in layered for tensor in _instances(rule, {"layer": layer}, sizes)]
    return found + [next(_instances(rule, {}, sizes)) for rule in after]


def _instances(rule: TensorRule, numbers: dict[str, int], sizes: Mapping[str, int]) -> Iterator[Expected]:
    shape = tuple(sizes[dimension] for dimension in rule.shape)
    if "{expert}" not in rule.role:
        role = rule.role.format(**numbers)
        yield Expected(role, rule.name.format(**numbers), shape, None, role)
        return
    dense = rule.role.replace(".{expert}", "").format(**numbers)
    for expert in range(sizes["experts"]):
        values = {**numbers, "expert": expert}
        yield Expected(rule.role.format(**values), rule.name.format(**values), shape, expert, dense)


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(escaped)
