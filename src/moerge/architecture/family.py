"""Families: a table of tensors (role, name, shape), read both ways, and the reading of a family's config."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from moerge.architecture.sizes import MAX_MODULES, Sizes


@dataclass(frozen=True)
class TensorRule:
    """One row of a family's table.

    `role` and `name` are templates in `{layer}` and, inside a MoE, `{expert}`. `shape` names dimensions (see `Sizes`).
    `when` names a config key that must be true for the tensor to exist, or "!key" for false; a list there is one value for
    each layer. `parts` are the roles of the dense tensors that a fused MoE tensor is made of: all of them of the first expert,
    one after the other along the rows, then all of them of the next. `layers` are the numbers of those that have it, None for
    all.
    """

    role: str
    name: str
    shape: tuple[str, ...]
    when: str = ""
    parts: tuple[str, ...] = ()
    layers: frozenset[int] | None = None

    def applies(self, config: Mapping[str, Any], layer: int | None = None) -> bool:
        """Return whether a model with this normalized config has the tensor (in this layer). ValueError for a list that is too
        short.
        """
        if layer is not None and not self.in_layer(layer):
            return False
        value = config.get(self.when.removeprefix("!"))
        if isinstance(value, list) and layer is not None:
            if layer >= len(value):
                raise ValueError(f"{self.when.removeprefix('!')} should have a value for each layer, not {len(value)}")
            value = value[layer]
        return not self.when or bool(value) != self.when.startswith("!")

    def in_layer(self, layer: int | str | None) -> bool:
        """Return whether a layer of this number may have the tensor."""
        return self.layers is None or layer is None or int(layer) in self.layers


@dataclass(frozen=True)
class ExpectedTensor:
    """A tensor that a model of a given config must have. `role` is its path, such as `layers.3.attention.q`.

    `dense_role` is the role of the dense tensor that it comes from, `parts` the roles of several.
    """

    role: str
    name: str
    shape: tuple[int, ...]
    expert: int | None = None
    dense_role: str = ""
    parts: tuple[str, ...] = ()


def _nothing(config: dict[str, Any]) -> None:
    """The family derives nothing."""


def _one(config: Mapping[str, Any]) -> float:
    """The family scales nothing."""
    return 1.0


@dataclass(frozen=True)
class Family:
    """A family of architectures.

    `defaults` are the config values that transformers assumes when config.json omits them; `buffers` match tensors that
    old checkpoints store but no model reads. The rest is for families that write things in their own way:

    - `keys`: config keys by their own name, and what other families call them (`{"n_embd": "hidden_size"}`);
    - `sizes`: further dimensions of `shape`, and their config keys;
    - `derive` completes a config, in place, as the model's own code does;
    - `rope_scaling_keys`: the only keys that transformers 4 allows in `rope_scaling`, and its names for them;
    - `nested`: the key that holds the language model's config in a config of several models;
    - `aliases`: regular expressions for the beginning of names as other programs write them, and what to put there;
    - `modules`: names by `{layer}`, and those that transformers has in memory where these differ;
    - `unmodeled` match tensors that belong to the model but have no role, and are merged by name;
    - `fused` match tensors of transformers' layout in memory, which is not the one on disk;
    - `float32` match parameters that transformers keeps in float32 whatever the rest has;
    - `source` says where a derived table comes from, "" for one that is written by hand;
    - `embedding_scale(config)` is what the embedding module multiplies rows by (not what happens to them afterwards), and
      `logit_scale(config)` what the head's outputs are multiplied by, both of a normalized config.
    """

    model_type: str
    architecture: str
    tensors: tuple[TensorRule, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    buffers: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)
    keys: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    derive: Callable[[dict[str, Any]], None] = _nothing
    rope_scaling_keys: Mapping[str, str] = field(default_factory=dict)
    nested: str = ""
    aliases: tuple[tuple[str, str], ...] = ()
    modules: Mapping[str, str] = field(default_factory=dict)
    unmodeled: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    source: str = ""
    embedding_scale: Callable[[Mapping[str, Any]], float] = _one
    logit_scale: Callable[[Mapping[str, Any]], float] = _one

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], re.Pattern[str], TensorRule]]:
        return [(_pattern(rule.name), _pattern(rule.role), rule) for rule in self.tensors]

    def role_of(self, name: str) -> str | None:
        """The role path of a tensor by its name, however that is spelled, or None if the family has no such tensor."""
        name = self.canonical_name(name)
        found = ((pattern.fullmatch(name), rule) for pattern, _, rule in self._patterns)
        matching = ((match.groupdict(), rule) for match, rule in found if match)
        return next((rule.role.format(**numbers) for numbers, rule in matching if rule.in_layer(numbers.get("layer"))), None)

    def name_of(self, role: str) -> str | None:
        """The name of the tensor with this role path, or None if the family has no such role."""
        found = ((pattern.fullmatch(role), rule) for _, pattern, rule in self._patterns)
        matching = ((match.groupdict(), rule) for match, rule in found if match)
        return next((rule.name.format(**numbers) for numbers, rule in matching if rule.in_layer(numbers.get("layer"))), None)

    def canonical_name(self, name: str) -> str:
        """A tensor's name as the table has it."""
        for memory, stored in self._renamed:
            if match := memory.fullmatch(name):
                return stored.format(**match.groupdict())
        for pattern, start in self.aliases:
            match = re.match(pattern, name)
            if match:
                return start + name[match.end() :]
        return name

    @cached_property
    def _renamed(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(memory), stored) for stored, memory in self.modules.items()]

    def name_in_memory(self, name: str) -> str | None:
        """The name that transformers has in memory for a tensor of the table, None where that is the same."""
        matches = ((_pattern(stored).fullmatch(name), memory) for stored, memory in self.modules.items())
        return next((memory.format(**match.groupdict()) for match, memory in matches if match), None)

    def is_buffer(self, name: str) -> bool:
        """Return whether a stored tensor can be ignored."""
        return _any_matches(self.buffers, name)

    def is_unmodeled(self, name: str) -> bool:
        """Return whether a tensor without a role is none that is out of place."""
        return _any_matches(self.unmodeled, name)

    def is_fused(self, name: str) -> bool:
        """Return whether a tensor is of transformers' layout in memory."""
        return _any_matches(self.fused, name)


def expected_tensors(family: Family, config: Mapping[str, Any]) -> list[ExpectedTensor]:
    """Every tensor of a model with this normalized config: what comes first in the model first.

    Raises ValueError if the config lacks a size or garbles it.
    """
    sizes = Sizes(config, family.sizes)
    layers = sizes["layers"]
    if layers * max(1, sizes["experts"]) > MAX_MODULES:
        raise ValueError(f"num_hidden_layers is {layers:,}, which no model has")
    outside = [rule for rule in family.tensors if "{layer}" not in rule.role and rule.applies(config)]
    before = [rule for rule in outside if rule.role.startswith("embedding")]
    layered = [rule for rule in family.tensors if "{layer}" in rule.role]
    found = [next(_instances(rule, {}, sizes)) for rule in before]
    for layer in range(layers):
        rules = [rule for rule in layered if rule.applies(config, layer)]
        found += [tensor for rule in rules for tensor in _instances(rule, {"layer": layer}, sizes)]
    return found + [next(_instances(rule, {}, sizes)) for rule in outside if rule not in before]


def _instances(rule: TensorRule, numbers: dict[str, int], sizes: Sizes) -> Iterator[ExpectedTensor]:
    shape = tuple(sizes[dimension] for dimension in rule.shape)
    parts = tuple(part.format(**numbers) for part in rule.parts)
    if "{expert}" not in rule.role:
        role = rule.role.format(**numbers)
        yield ExpectedTensor(role, rule.name.format(**numbers), shape, None, role, parts)
        return
    dense = rule.role.replace(".{expert}", "").format(**numbers)
    for expert in range(sizes["experts"]):
        values = {**numbers, "expert": expert}
        yield ExpectedTensor(rule.role.format(**values), rule.name.format(**values), shape, expert, dense, parts)


def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return re.compile(escaped)


def _any_matches(patterns: tuple[str, ...], name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
