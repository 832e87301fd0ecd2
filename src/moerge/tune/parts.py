"""Which parameters belong to the router, the experts, the projectors and the backbone; what is trained from which step on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from moerge.architecture.sequence import MODEL_TYPE
from moerge.modeling.naming_moerge import dense_name, role_of
from moerge.tune.settings import PARTS, Request

Parts = Mapping[str, frozenset[str]]

_EXPERTS = re.compile(r"\.experts\.")


def router_modules(model: Any) -> dict[str, Any]:
    """A native MoE's routers by name, in the order of layers: what transformers calls a ...TopKRouter."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("TopKRouter")}


def parts_of(model: Any) -> Parts:
    """Names of a model's parameters by part. A dense model is backbone; so are shared experts, which see every token."""
    names = [name for name, _ in model.named_parameters()]
    routers = tuple(f"{name}." for name in router_modules(model))
    by_sequence = model.config.model_type == MODEL_TYPE
    found: dict[str, set[str]] = {part: set() for part in PARTS[:-1]}
    for name in names:
        if name.startswith(("router.", *routers)):
            part = "router"
        elif "projector" in name:
            part = "projectors"
        elif _separate(name, model.config) if by_sequence else _EXPERTS.search(name):
            part = "experts"
        else:
            part = "backbone"
        found[part].add(name)
    return {**{part: frozenset(own) for part, own in found.items()}, "all": frozenset(names)}


def _separate(name: str, config: Any) -> bool:
    try:
        return role_of(dense_name(name)[0]) in config.separate
    except ValueError:
        return False


@dataclass(frozen=True)
class Schedule:
    """What is open from which step on: `openings` are (step, parameter names), the first at step 0."""

    openings: tuple[tuple[int, frozenset[str]], ...]

    @property
    def ever(self) -> frozenset[str]:
        """What is trained at some time."""
        return frozenset().union(*(names for _, names in self.openings))

    def closed(self, step: int) -> frozenset[str]:
        """What will be trained, but not yet at this step."""
        return self.ever.difference(*(names for start, names in self.openings if start <= step))


def make_schedule(request: Request, parts: Parts) -> Schedule:
    """The schedule of `train` and `opens`. Raises InputError for a part that the model lacks or a pattern without a match."""
    settings = request.settings
    openings = [(0, _chosen(request, ("train",), settings.train, parts))]
    for index, opening in enumerate(settings.opens):
        openings.append((opening.step, _chosen(request, ("opens", index, "train"), opening.train, parts)))
    return Schedule(tuple(openings))


def _chosen(request: Request, path: tuple[str | int, ...], wanted: Sequence[str], parts: Parts) -> frozenset[str]:
    found: set[str] = set()
    for name in wanted:
        own = parts.get(name)
        if own is None:
            own = frozenset(known for known in parts["all"] if fnmatchcase(known, name))
            if not own:
                raise request.error(path, f": {name!r} is none of {', '.join(PARTS)}, and no parameter's name matches it")
        if not own:
            has = ", ".join(part for part in PARTS[:-1] if parts[part])
            raise request.error(path, f": the model has no {name}; it has {has}")
        found |= own
    return frozenset(found)


def check_losses(request: Request, model: Any, parts: Parts) -> None:
    """InputError for a loss that this model cannot have."""
    losses, by_sequence = request.settings.losses, model.config.model_type == MODEL_TYPE
    for key in ("load_balance", "router_z"):
        if getattr(losses, key) and not parts["router"]:
            what = f"its routing is {model.config.routing['kind']!r}" if by_sequence else "it is dense"
            raise request.error(("losses", key), f": the model has no router to balance, {what}")
    if losses.distillation.hidden and by_sequence:
        raise request.error(("losses", "distillation", "hidden"), ": chosen experts have hidden states each: compare logits only")
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    beyond = [layer for layer in losses.distillation.hidden_layers if layer > layers]
    if beyond:
        message = f": there is no layer {beyond[0]}, the model has {layers}"
        raise request.error(("losses", "distillation", "hidden_layers"), message)


def hidden_layers(request: Request, model: Any) -> tuple[int, ...]:
    """The layers whose hidden states are compared."""
    distillation = request.settings.losses.distillation
    if not distillation.hidden:
        return ()
    return distillation.hidden_layers or (max(1, int(model.config.get_text_config().num_hidden_layers) // 2),)
