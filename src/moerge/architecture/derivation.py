"""A family's table as transformers has it: read from a model that has shapes but no values. Imports torch."""

# mypy: allow-untyped-calls

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers

from moerge.architecture.meta_model import MetaModel, NoTableError, as_stored, attribute, enlarge, settings_of
from moerge.architecture.role_names import layer_role, outer_role
from moerge.quiet import without_warnings

_MORE = 64
"""Rows that a vocabulary is enlarged by, to see which tensors follow it."""
_CANONICAL = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


def derive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The table of a model with this config.json, as JSON. Raises NoTableError."""
    with without_warnings(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, larger = MetaModel.of(settings_of(config), config), settings_of(config)
        enlarge(larger, _MORE)
        try:
            return _Table(model, MetaModel.of(larger, config)).to_json()
        except NoTableError:  # sizes that do not go with others
            return _Table(model, None).to_json()


@dataclass(frozen=True)
class _Place:
    """A tensor in a layer: the number of the layer, and the path below it."""

    layer: int
    path: tuple[str, ...]


@dataclass
class _Table:
    """The table of a model; `larger` is the same with more tokens."""

    model: MetaModel
    larger: MetaModel | None
    lists: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The whole table."""
        model, own = self.model, self.model.model
        embedding, head, bias = self._ends()
        self.lists = self._layer_lists(embedding)
        roles = self._roles(embedding, head, bias)
        return {
            "architecture": type(own).__name__,
            "nested": self._nested(),
            "keys": {name: key for key, name in (getattr(model.text, "attribute_map", None) or {}).items() if key in _CANONICAL},
            "values": self._values(),
            "tensors": [*self._rules(roles), *self._tied_head(head, embedding)],
            "aliases": self._aliases(),
            "modules": self._modules(roles),
            "unmodeled": self._unmodeled(roles),
            "buffers": self._buffers(),
            "fused": sorted({_general(name) for name in self.model.memory if self._is_converted(name)}),
            "float32": self._float32(),
        }

    def _ends(self) -> tuple[Any, Any, Any]:
        """The parameters of input embedding and head, and the head's bias."""
        found = []
        for get in (self.model.model.get_input_embeddings, self.model.model.get_output_embeddings):
            try:
                found.append(get())
            except (NotImplementedError, AttributeError):
                found.append(None)
        weight = getattr(found[0], "weight", None)
        if weight is None:
            raise NoTableError("it has no input embedding")
        return weight, getattr(found[1], "weight", None), getattr(found[1], "bias", None)

    def _layer_lists(self, embedding: Any) -> list[str]:
        """The names of the lists of the language model's layers."""
        layers = getattr(self.model.text, "num_hidden_layers", None)
        modules = dict(self.model.model.named_modules())
        every = {name: m for name, m in modules.items() if isinstance(m, torch.nn.ModuleList) and len(m) > 0}
        lists = {name: m for name, m in every.items() if len(m) == layers} or every
        lists = {name: m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
        first = next((name for name, value in self.model.memory.items() if value is embedding), "")
        groups: dict[str, list[str]] = {}
        for name in lists:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        if not groups:
            raise NoTableError("it has no list of layers")
        sizes = {parent: sum(_size(lists[name]) for name in names) for parent, names in groups.items()}
        best = max(groups, key=lambda parent: (_shared(parent, first), "decoder" in parent, sizes[parent]))
        return [name for name in groups[best] if len(lists[name]) == max(len(lists[other]) for other in groups[best])]

    @cached_property
    def _layers(self) -> int:
        """The number of layers, which not every config calls num_hidden_layers."""
        return len(dict(self.model.model.named_modules())[self.lists[0]])

    def _nested(self) -> str:
        text, settings = self.model.text, self.model.settings
        if text is settings or type(text) is type(settings):
            return ""
        return next((key for key in settings.sub_configs if getattr(settings, key, None) is text), "")

    def _values(self) -> dict[str, Any]:
        """Return the values that transformers reads of the config, with the language model's part among its own keys."""
        text, settings, nested = self.model.text, self.model.settings, self._nested()
        whole = settings.to_dict()
        inner = whole.pop(nested, {}) if nested else {}
        values = {**inner, **whole}
        canonical = {key: attribute(text, key) for key in _CANONICAL}
        tied = getattr(settings, "tie_word_embeddings", canonical["tie_word_embeddings"])
        values |= {key: value for key, value in canonical.items() if value is not None}
        experts = self._experts
        more: dict[str, Any] = {"num_local_experts": experts} if experts else {}
        more |= {"num_hidden_layers": self._layers, "tie_word_embeddings": bool(tied), "model_type": settings.model_type}
        return {**values, **more}

    @cached_property
    def _experts(self) -> int:
        return next((n for key in _EXPERT_COUNTS if type(n := attribute(self.model.text, key)) is int), 0)

    @cached_property
    def _memory_names(self) -> dict[int, str]:
        return {id(value): name for name, value in self.model.memory.items()}

    def _is_converted(self, name: str) -> bool:
        """True if a tensor in memory is none on disk, under any name."""
        return name not in self.model.files and id(self.model.memory[name]) not in self._file_ids

    @cached_property
    def _file_ids(self) -> frozenset[int]:
        return frozenset(map(id, self.model.files.values()))

    def _roles(self, embedding: Any, head: Any, bias: Any) -> dict[str, tuple[str, int | None]]:
        """By name on disk, of the language model's tensors: the role, with `{layer}` for the layer, and the layer."""
        ends = {id(embedding): "embedding", id(head): "head", id(bias): "head.bias"} | {id(embedding): "embedding"}
        places = {name: self._place(name, value) for name, value in self.model.files.items()}
        beside: dict[int, set[str]] = {}
        for placed in filter(None, places.values()):
            beside.setdefault(placed.layer, set()).update({placed.path[0], ".".join(placed.path[:2])})
        roles: dict[str, tuple[str, int | None]] = {}
        for name, value in self.model.files.items():
            place = places[name]
            if id(value) in ends:
                roles[name] = ends[id(value)], None
            elif place is not None:
                roles[name] = f"layers.{{layer}}.{layer_role(place.path, beside[place.layer])}", place.layer
            elif (path := self._below(self._memory_names.get(id(value), name))) is not None:
                roles[name] = outer_role(path), None
        return self._unique(roles, places)

    def _unique(
        self, roles: Mapping[str, tuple[str, int | None]], places: Mapping[str, _Place | None]
    ) -> dict[str, tuple[str, int | None]]:
        """The roles; names below the layer instead of those that several tensors would share."""
        shared = {role for role, count in Counter(roles.values()).items() if count > 1}
        general = {role for role, _ in shared}
        plain = {}
        for name, (role, layer) in roles.items():
            place = places[name]
            own = ".".join(place.path) if place is not None else name
            own = f"layers.{{layer}}.{own.removesuffix('.weight')}" if place is not None else own
            plain[name] = (own if role in general and role not in ("embedding", "head") else role, layer)
        if len(set(plain.values())) < len(plain):
            raise NoTableError("its tensors cannot be told apart")
        return plain

    def _place(self, name: str, value: Any) -> _Place | None:
        """The layer that a tensor belongs to: by its name in memory where it has one, else by that on disk."""
        known = self._memory_names.get(id(value))
        for spelled in filter(None, (known, None if known else name)):
            for start in (*self.lists, *self._stored_lists):
                match = re.fullmatch(rf"{re.escape(start)}\.(\d+)\.(.+)", spelled)
                if match:
                    below = tuple(match[2].split("."))
                    several = (start.rpartition(".")[2],) if len(self.lists) > 1 else ()
                    return _Place(int(match[1]), (*several, *below))
        return None

    @cached_property
    def _stored_lists(self) -> list[str]:
        """Return the names of the lists of layers on disk."""
        found: dict[str, None] = {}
        for name, value in self.model.files.items():
            known = self._memory_names.get(id(value), "")
            start = next((start for start in self.lists if known.startswith(f"{start}.")), None)
            match = re.match(r"(.+?)\.\d+\.", name)
            if start and known != name and match:
                number = re.match(r"\d+", known[len(start) + 1 :])
                for candidate in re.finditer(r"\.(\d+)\.", name):
                    if number and candidate[1] == number[0]:
                        found[name[: candidate.start()]] = None
                        break
        return list(found)

    def _below(self, name: str) -> list[str] | None:
        """The path of a tensor below the language model, None for one that is beside it."""
        parent = self.lists[0].rpartition(".")[0]
        start = f"{parent}." if parent else ""
        if not name.startswith(start) or self._other_model(name):
            return None
        return name.removeprefix(start).split(".")

    def _other_model(self, name: str) -> bool:
        """True if a tensor belongs to a model inside with another config, such as a vision tower."""
        modules = dict(self._others)
        parts = name.split(".")
        return any(".".join(parts[:n]) in modules for n in range(1, len(parts)))

    @cached_property
    def _others(self) -> list[tuple[str, Any]]:
        first = self.lists[0]
        text = type(self.model.text)
        return [
            (name, module)
            for name, module in self.model.model.named_modules()
            if isinstance(module, transformers.PreTrainedModel)
            and not first.startswith(f"{name}.")
            and name
            and (type(module.config) is not text or not first.startswith(name))
        ]

    def _rules(self, roles: Mapping[str, tuple[str, int | None]]) -> list[dict[str, Any]]:
        """The rows of the table: names and roles with `{layer}` and `{expert}`, and the layers that have them."""
        rows: dict[tuple[str, str, tuple[str, ...]], dict[str, set[int]]] = {}
        for name, (role, layer) in roles.items():
            shape = self._shape(name)
            named, role, layer = self._templates(name, role, layer)
            named, role, expert = self._expert_templates(named, role)
            row = rows.setdefault((role, named, shape), {"layers": set(), "experts": set()})
            row["layers"] |= set() if layer is None else {layer}
            row["experts"] |= set() if expert is None else {expert}
        layers = set(range(self._layers))
        return [
            {
                "role": role,
                "name": name,
                "shape": list(shape),
                **({"layers": sorted(row["layers"])} if row["layers"] and row["layers"] != layers else {}),
                **({"when": "!tie_word_embeddings"} if role == "head" and self._can_tie else {}),
            }
            for (role, name, shape), row in rows.items()
        ]

    @cached_property
    def _can_tie(self) -> bool:
        """True if config.json decides whether the head is the embedding."""
        return bool(getattr(self.model.model, "_tied_weights_keys", None))

    def _tied_head(self, head: Any, embedding: Any) -> list[dict[str, Any]]:
        """The row of a head that is the embedding here and would be stored if the config did not tie it."""
        if head is None or head is not embedding or not self._can_tie:
            return []
        state = self.model.model.state_dict(keep_vars=True)
        saved = self._memory_names[id(embedding)]
        name = next((name for name, value in state.items() if value is head and name != saved), None)
        if name is None:
            return []
        stored = next(iter(as_stored(self.model.model, {name: torch.empty_like(head)})))
        shape = self._shape(self.model.stored_name(embedding))
        return [{"role": "head", "name": stored, "shape": list(shape), "when": "!tie_word_embeddings"}]

    def _templates(self, name: str, role: str, layer: int | None) -> tuple[str, str, int | None]:
        """Name and role with `{layer}`; as they are where the name has another number than the layer's."""
        if layer is None:
            return name, role, None
        for start in (*self.lists, *self._stored_lists):
            if name.startswith(f"{start}.{layer}."):
                return f"{start}.{{layer}}{name[len(start) + 1 + len(str(layer)) :]}", role, layer
        return name, role.format(layer=layer), None

    def _expert_templates(self, name: str, role: str) -> tuple[str, str, int | None]:
        """Name and role with `{expert}`, where all of the config's experts have a tensor of their own."""
        found = re.search(r"experts\.(\d+)\.", name)
        inside = re.search(r"\.ffn\.(\d+)\.", role)
        if not (found and inside and found[1] == inside[1] and int(found[1]) < self._experts):
            return name, role, None
        named = f"{name[: found.start(1)]}{{expert}}{name[found.end(1) :]}"
        return named, f"{role[: inside.start(1)]}{{expert}}{role[inside.end(1) :]}", int(found[1])

    def _shape(self, name: str) -> tuple[str, ...]:
        """The sizes of a tensor: "vocab" where it has a row for each token, "experts" where one for each expert."""
        shape = tuple(self.model.files[name].shape)
        sizes = [str(size) for size in shape]
        tokens = getattr(self.model.text, "vocab_size", None)
        other = self.larger.files.get(name) if self.larger is not None else None
        if shape and shape[0] == tokens and other is not None and other.shape[0] == shape[0] + _MORE:
            sizes[0] = "vocab"
        if len(shape) == 3 and shape[0] == self._experts and "expert" in name:
            sizes[0] = "experts"
        return tuple(sizes)

    def _aliases(self) -> list[list[str]]:
        """The beginnings of names in memory, and what names on disk have instead."""
        found: dict[str, set[str]] = {}
        for name, value in self.model.files.items():
            known = self._memory_names.get(id(value), name)
            if known == name:
                found.setdefault(known.partition(".")[0] + ".", set()).add(known.partition(".")[0] + ".")
                continue
            end = 0
            mine, own = known.split("."), name.split(".")
            while end < min(len(mine), len(own)) and mine[-1 - end] == own[-1 - end]:
                end += 1
            old, new = mine[: len(mine) - end], own[: len(own) - end]
            if not any(part.isdigit() for part in (*old, *new)):
                found.setdefault("".join(f"{part}." for part in old), set()).add("".join(f"{part}." for part in new))
        aliases = []
        for start, options in sorted(found.items(), key=lambda item: -len(item[0])):
            instead = next(iter(options))
            if len(options) == 1 and instead != start and start and not any(n.startswith(start) for n in self.model.files):
                aliases.append([re.escape(start), instead])
        return aliases

    def _modules(self, roles: Mapping[str, tuple[str, int | None]]) -> dict[str, str]:
        """Names on disk, and the names in memory of the same tensors where they differ, for all layers together."""
        pairs: dict[str, str] = {}
        for name, (role, layer) in roles.items():
            known = self._memory_names.get(id(self.model.files[name]), name)
            if known != name and known not in self.model.files:
                pairs[self._templates(name, role, layer)[0]] = self._templates(known, role, layer)[0]
        return pairs

    def _unmodeled(self, roles: Mapping[str, tuple[str, int | None]]) -> list[str]:
        """Patterns of the tensors beside the language model: the modules that have none of its own."""
        own = {".".join(parts[:n]) for name in roles for parts in [name.split(".")] for n in range(len(parts))}
        found: dict[str, None] = {}
        for name in self.model.files:
            if name in roles:
                continue
            parts = name.split(".")
            start = next((".".join(parts[:n]) for n in range(1, len(parts)) if ".".join(parts[:n]) not in own), name)
            found[re.escape(start) + (r"\..*" if start != name else "")] = None
        return list(found)

    def _buffers(self) -> list[str]:
        """Patterns of what the model computes itself, and old checkpoints may store."""
        own = self.model.model
        computed = {name for name, _ in own.named_buffers()} - set(own.state_dict())
        patterns = {r".*\." + _general(".".join(name.split(".")[-2:])) for name in computed}
        return sorted(pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in self.model.files))

    def _float32(self) -> list[str]:
        """Patterns of parameters that transformers keeps in float32."""
        own = self.model.model
        asked = {*(own._keep_in_fp32_modules or ()), *(getattr(own, "_keep_in_fp32_modules_strict", None) or ())}
        if not asked:
            return []
        pattern = re.compile("|".join(rf"((^|\.){name}($|\.))" for name in sorted(asked)))
        names = self._memory_names
        return sorted({_general(n) for n, value in self.model.files.items() if pattern.search(names.get(id(value), n))})


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shared(parent: str, name: str) -> int:
    """The number of modules that two paths begin with alike; -1 where the parent does not hold the name's module."""
    count = 0
    for own, other in zip(parent.split("."), name.split("."), strict=False):
        if own != other:
            break
        count += 1
    return count


def _general(name: str) -> str:
    """A pattern of a name for all layers."""
    return re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
