"""Parameters of the router, the experts, the projectors and the backbone, and the step from which each is trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from moerge.architecture.sequence import BY_SEQUENCE, HETEROGENEOUS
from moerge.errors import suggest
from moerge.modeling.adapters_moerge import plain_name
from moerge.modeling.naming_moerge import dense_name, role_of
from moerge.tuning.settings import PARTS, TuneConfig

Parts = Mapping[str, frozenset[str]]

_EXPERTS = re.compile(r"\.experts\.")
_WHOLE = re.compile(r"model\.experts\.(\d+)\.")
"""What the names of an expert that is a whole model begin with."""
_SINGLE = "experts."
_SLICE = re.compile(r"(.+)\[(\d+)\]")


def router_modules(model: Any) -> dict[str, Any]:
    """A native MoE's routers by name, in the order of layers: what transformers calls a ...TopKRouter.

    Those inside an expert that is a whole model belong to that expert.
    """
    if model.config.model_type == HETEROGENEOUS:
        return {}
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("TopKRouter")}


def parts_of(model: Any, experts: Sequence[str] = ()) -> Parts:
    """Names of a model's parameters by part. A dense model is backbone; so are shared experts, which see every token.

    `experts.NAME` is the part of a single expert: of a native MoE, whose `experts` are called so in its manifest, a slice of each
    parameter (see `Schedule`). Experts that are adapters have only those of their own.
    """
    classify = _classifier(model)
    names = [name for name, _ in model.named_parameters()]
    by_part: dict[str, set[str]] = {part: set() for part in PARTS[:-1]}
    for name in names:
        by_part[classify(name)].add(name)
    by_sequence = model.config.model_type in BY_SEQUENCE
    single = _by_number(by_part["experts"]) if by_sequence else _slices(model, by_part["experts"])
    called = list(model.config.expert_names) if by_sequence else list(experts) or list(map(str, range(len(single))))
    for number, of_expert in single.items():
        if number < len(called):
            by_part[f"experts.{called[number]}"] = of_expert
    return {**{part: frozenset(members) for part, members in by_part.items()}, "all": frozenset(names)}


def _classifier(model: Any) -> Callable[[str], str]:
    """Return a function from a parameter's name to its part, for this kind of model."""
    routers = ("router.", *(f"{name}." for name in router_modules(model)))
    merged_experts = model.config.model_type in BY_SEQUENCE and model.config.model_type != HETEROGENEOUS

    def is_expert(name: str) -> bool:
        return _separate(name, model.config) if merged_experts else bool(_EXPERTS.search(name))

    def classify(name: str) -> str:
        if name.startswith(routers):
            return "router"
        if "projector" in name:
            return "projectors"
        return "experts" if is_expert(name) else "backbone"

    return classify


def _separate(name: str, config: Any) -> bool:
    if getattr(config, "adapters", None) is not None:
        return plain_name(name) is not None
    try:
        return role_of(dense_name(name)[0]) in config.separate
    except ValueError:
        return False


def _by_number(names: Iterable[str]) -> dict[int, set[str]]:
    """A sequence-routed model's expert parameters by the expert's number."""
    found: dict[int, set[str]] = {}
    for name in names:
        if whole := _WHOLE.match(name):
            found.setdefault(int(whole[1]), set()).add(name)
            continue
        factor = plain_name(name)
        found.setdefault(factor[1] if factor else dense_name(name)[1], set()).add(name)
    return dict(sorted(found.items()))


def _slices(model: Any, names: Iterable[str]) -> dict[int, set[str]]:
    """Slices of a native MoE's expert parameters by the expert's number; empty if not all hold one expert after the other."""
    parameters = dict(model.named_parameters())
    stacked = [parameters[name] for name in names]
    lengths = {len(parameter) for parameter in stacked}
    if len(lengths) != 1 or not any(parameter.ndim == 3 for parameter in stacked):
        return {}
    return {number: {f"{name}[{number}]" for name in names} for number in range(lengths.pop())}


def split_slice(name: str) -> tuple[str, int | None]:
    """A parameter's name and, of a slice, its number."""
    match = _SLICE.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


@dataclass(frozen=True)
class Schedule:
    """The schedule of training: `unfreeze_steps` are (step, parameter names), the first at step 0.

    `name[3]` is the slice number 3 of a parameter, the weights of one expert; of such a parameter only open slices move.
    """

    unfreeze_steps: tuple[tuple[int, frozenset[str]], ...]

    @property
    def ever_trained(self) -> frozenset[str]:
        """Parameters that are trained at some time, some of them only in slices."""
        return frozenset(split_slice(name)[0] for _, names in self.unfreeze_steps for name in names)

    def frozen(self, step: int) -> frozenset[str]:
        """Return the parameters that will be trained, but not yet at this step."""
        return self.ever_trained.difference(split_slice(name)[0] for name in self._open(step))

    def slices(self, step: int) -> dict[str, list[int]]:
        """The open slices of parameters that are open only in part at this step."""
        found: dict[str, list[int]] = {}
        opened = self._open(step)
        for name, number in map(split_slice, sorted(opened)):
            if number is not None and name not in opened:
                found.setdefault(name, []).append(number)
        return found

    @property
    def sliced(self) -> frozenset[str]:
        """Parameters that are open only in part at some time."""
        return frozenset(name for start, _ in self.unfreeze_steps for name in self.slices(start))

    def trained(self, sizes: Mapping[str, tuple[int, ...]]) -> int:
        """Count the numbers that are trained at some time, of parameters with these shapes."""
        last = max(start for start, _ in self.unfreeze_steps)
        slices = self.slices(last)
        whole = sum(prod(sizes[name]) for name in self.ever_trained if name not in slices)
        return whole + sum(len(numbers) * prod(sizes[name][1:]) for name, numbers in slices.items())

    def _open(self, step: int) -> frozenset[str]:
        return frozenset().union(*(names for start, names in self.unfreeze_steps if start <= step))


def make_schedule(tune_config: TuneConfig, parts: Parts) -> Schedule:
    """The schedule of `train` and `opens`. Raises InputError for a part that the model lacks or a pattern without a match."""
    settings = tune_config.settings
    unfreeze_steps = [(0, select_parameters(tune_config, ("train",), settings.trains, parts))]
    for index, opening in enumerate(settings.opens):
        unfreeze_steps.append((opening.step, select_parameters(tune_config, ("opens", index, "train"), opening.train, parts)))
    return Schedule(tuple(unfreeze_steps))


def select_parameters(
    tune_config: TuneConfig, path: tuple[str | int, ...], wanted: Sequence[str], parts: Parts
) -> frozenset[str]:
    """Parameters that names of parts and patterns mean; `path` says where they stand. Raises InputError for one without any."""
    found: set[str] = set()
    for name in wanted:
        own = parts.get(name)
        if own is None:
            own = frozenset(known for known in parts["all"] if fnmatchcase(known, name))
            single = [part for part in parts if part.startswith(_SINGLE)]
            if not own and name.startswith(_SINGLE) and single:
                raise tune_config.error(path, f": there is no {name!r}, {suggest(name, single)}", code="unknown-name")
            if not own:
                raise tune_config.error(path, f": {name!r} is none of {', '.join(PARTS)}, and no parameter's name matches it")
        if not own:
            has = ", ".join(part for part in PARTS[:-1] if parts[part])
            raise tune_config.error(path, f": the model has no {name}; it has {has}")
        found |= own
    return frozenset(found)


def check_losses(tune_config: TuneConfig, model: Any, parts: Parts) -> None:
    """InputError for a loss that this model cannot have."""
    losses, by_sequence = tune_config.settings.losses, model.config.model_type in BY_SEQUENCE
    for key in ("load_balance", "router_z"):
        if getattr(losses, key) and not parts["router"]:
            what = f"its routing is {model.config.routing['kind']!r}" if by_sequence else "it is dense"
            raise tune_config.error(("losses", key), f": the model has no router to balance, {what}")
    if losses.distillation.hidden and by_sequence:
        raise tune_config.error(
            ("losses", "distillation", "hidden"), ": chosen experts have hidden states each: compare logits only"
        )
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    beyond = [layer for layer in losses.distillation.hidden_layers if layer > layers]
    if beyond:
        message = f": there is no layer {beyond[0]}, the model has {layers}"
        raise tune_config.error(("losses", "distillation", "hidden_layers"), message)


def hidden_layers(tune_config: TuneConfig, model: Any) -> tuple[int, ...]:
    """The layers whose hidden states are compared."""
    distillation = tune_config.settings.losses.distillation
    if not distillation.hidden:
        return ()
    return distillation.hidden_layers or (max(1, int(model.config.get_text_config().num_hidden_layers) // 2),)
