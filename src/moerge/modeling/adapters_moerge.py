"""Adapters in a sequence-routed model: the linear layers and experts that have them, and the names of their tensors.

`adapters` of config.json has, by expert's name, groups of modules that are alike:

    {"math": [{"rank": 8, "scale": 2.0, "modules": ["mlp.gate_proj", "self_attn.q_proj"], "layers": [0, 1]}], "base": []}

Without `layers` all of them are meant; an expert that is not named, such as the base, has none. The factors of expert 2 of
`model.layers.3.mlp.gate_proj.weight` [out, in] are `model.layers.3.mlp.0.gate_proj.adapters.2.A` [rank, in] and `.B` [out, rank].
This file needs neither torch nor moerge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .naming_moerge import role_of, separate_name

ADAPTED_ROLES = ("ffn", "attention")
"""Separate roles that can be kept as adapters: those made of linear layers."""
FACTORS = ("A", "B")

_KEYS = ("rank", "scale", "modules", "layers")


@dataclass(frozen=True)
class Adapted:
    """A linear layer, such as `mlp.gate_proj` of layer 3, of which an expert has an adapter: scale * B @ A is added to it."""

    expert: int
    layer: int
    module: str
    rank: int
    scale: float

    @property
    def weight(self) -> str:
        """The dense name of the weight that it changes."""
        return f"model.layers.{self.layer}.{self.module}.weight"


def adapted(config: Mapping[str, Any]) -> Iterator[Adapted]:
    """All adapters of a config.json of which `check_adapters` holds, by layer, module and expert."""
    names, layers = config["expert_names"], config["expert_config"]["num_hidden_layers"]
    found = [one for name, groups in (config.get("adapters") or {}).items() for one in _of(names.index(name), groups, layers)]
    yield from sorted(found, key=lambda one: (one.layer, one.module, one.expert))


def _of(expert: int, groups: Sequence[Mapping[str, Any]], layers: int) -> Iterator[Adapted]:
    for group in groups:
        for layer in range(layers) if group.get("layers") is None else group["layers"]:
            for module in group["modules"]:
                yield Adapted(expert, layer, module, group["rank"], group["scale"])


def factor_name(weight: str, expert: int, factor: str) -> str:
    """The name of an adapter's factor, "A" or "B", from the dense name of the weight that it changes."""
    return f"{separate_name(weight, 0).removesuffix('weight')}adapters.{expert}.{factor}"


def plain_name(name: str) -> tuple[str, int, str] | None:
    """The name of the shared weight, the expert and the factor, from a factor's name; None for all other names."""
    module, _, rest = name.rpartition(".adapters.")
    expert, _, factor = rest.partition(".")
    return (f"{module}.weight", int(expert), factor) if module and expert.isdigit() and factor in FACTORS else None


def groups_of(found: Sequence[Adapted], layers: int) -> list[dict[str, Any]]:
    """One expert's adapters as config.json writes them."""
    alike: dict[tuple[int, float, str], list[int]] = {}
    for one in found:
        alike.setdefault((one.rank, one.scale, one.module), []).append(one.layer)
    groups: dict[tuple[int, float, tuple[int, ...]], list[str]] = {}
    for (rank, scale, module), where in alike.items():
        groups.setdefault((rank, scale, tuple(sorted(where))), []).append(module)
    return [
        {"rank": rank, "scale": scale, "modules": modules, **({} if len(where) == layers else {"layers": list(where)})}
        for (rank, scale, where), modules in groups.items()
    ]


def check_adapters(adapters: Any, expert_names: Sequence[str], separate: Sequence[str], layers: int) -> Any:
    """`adapters` as it is, None for none; ValueError says what is wrong with it."""
    if adapters is None:
        return None
    if not isinstance(adapters, Mapping):
        raise ValueError("adapters should be a mapping from experts to lists of groups")
    other = next((role for role in separate if role not in ADAPTED_ROLES), None)
    if other:
        raise ValueError(f"adapters cannot keep {other!r} separate, only {' and '.join(ADAPTED_ROLES)}")
    for name, groups in adapters.items():
        if name not in expert_names:
            raise ValueError(f"adapters of {name!r}: the experts are {', '.join(expert_names)}")
        seen: set[tuple[int, str]] = set()
        if not isinstance(groups, list):
            raise ValueError(f"adapters of {name!r} should be a list of groups")
        for group in groups:
            _check_group(group, f"adapters of {name!r}", separate, layers)
            for one in _of(0, [group], layers):
                if (one.layer, one.module) in seen:
                    raise ValueError(f"adapters of {name!r} name {one.module!r} of layer {one.layer} twice")
                seen.add((one.layer, one.module))
    return dict(adapters)


def _check_group(group: Any, where: str, separate: Sequence[str], layers: int) -> None:
    if not isinstance(group, Mapping) or not {"rank", "scale", "modules"} <= set(group) <= set(_KEYS):
        raise ValueError(f"{where}: a group has {', '.join(_KEYS)}, not {group!r}")
    rank, scale, modules = group["rank"], group["scale"], group["modules"]
    if type(rank) is not int or rank < 1 or isinstance(scale, bool) or not isinstance(scale, int | float):
        raise ValueError(f"{where}: rank should be a whole number of at least 1 and scale a number")
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        raise ValueError(f"{where}: modules should be a list of names")
    for module in modules:
        if role_of(f"model.layers.0.{module}.weight") not in separate:
            raise ValueError(f"{where}: {module!r} is shared; separate are {', '.join(separate)}")
    where_layers = group.get("layers")
    if where_layers is not None and not (
        isinstance(where_layers, list) and all(type(layer) is int and 0 <= layer < layers for layer in where_layers)
    ):
        raise ValueError(f"{where}: layers should be a list of numbers from 0 to {layers - 1}")
