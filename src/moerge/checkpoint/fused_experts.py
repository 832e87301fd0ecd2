"""LoRA on parameters that hold all experts of a layer (peft's `target_parameters`), however a checkpoint stores the experts.

peft names the parameter nowhere in a file: factors of one module are nested by `base_layer`. Which factors belong to which
parameter, and which way round, the shapes tell; where they do not, the adapter is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

import numpy as np

from moerge.checkpoint.adapter_config import AdapterConfig
from moerge.checkpoint.module_names import plain_name
from moerge.checkpoint.reader import ADAPTER_CONFIG, Checkpoint
from moerge.errors import InputError
from moerge.tensors.source import Source
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.expert_factors import Packing, StackedFactor
from moerge.tensors.views.joined import Joined
from moerge.tensors.views.rows import RowsTensor

_SEPARATE = re.compile(r"(?P<module>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""What a parameter is made of where each expert has tensors of its own: one after the other along the rows."""
_FUSED = re.compile(r"(?P<module>.+\.experts)\.(?P<parameter>\w+)")
_LINEAR = re.compile(r"(?P<block>.+)\.(?P<name>input_linear|output_linear)\.weight")
_OF_LINEAR = {"input_linear": "gate_up_proj", "output_linear": "down_proj"}
"""GraniteMoe's names on disk of what transformers 5 calls otherwise."""
INPUTS_FIRST = frozenset({"gpt_oss", "openai_privacy_filter", "aria_text", "aria"})
"""Types whose experts are [inputs, outputs], and known to be so by peft (`is_transposed`)."""
_NESTED = re.compile(r"(\.base_layer)*$")


@dataclass(frozen=True)
class ExpertParameter:
    """A parameter of shape [experts, rows, columns]: one `stored` tensor, or for each expert several, by their names."""

    name: str
    experts: int
    rows: int
    columns: int
    stored: tuple[tuple[str, ...], ...]

    @property
    def is_one(self) -> bool:
        """True if all experts lie in one tensor."""
        return len(self.stored) == 1


class Fit(NamedTuple):
    """Factors that belong to a parameter; `turned` if they are of its transpose."""

    parameter: ExpertParameter
    module: str
    turned: bool


def expert_parameters(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, ExpertParameter]]:
    """The parameters of each module of experts, by the module's plain name and their own."""
    found: dict[str, dict[str, ExpertParameter]] = {}
    separate: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors.items():
        match = _SEPARATE.fullmatch(name)
        if match:
            separate.setdefault(match["module"], {})[int(match["expert"]), match["part"]] = tensor
        elif len(tensor.shape) == 3 and (place := _fused_place(name)):
            found.setdefault(plain_name(place[0]), {})[place[1]] = ExpertParameter(place[1], *tensor.shape, ((name,),))
    for module, parts in separate.items():
        own = found.setdefault(plain_name(module), {})
        own |= {parameter.name: parameter for parameter in _separate_parameters(parts)}
    return found


def _fused_place(name: str) -> tuple[str, str] | None:
    """The module and the parameter in memory of a tensor with all experts."""
    linear, match = _LINEAR.fullmatch(name), _FUSED.fullmatch(name)
    if linear:
        return f"{linear['block']}.experts", _OF_LINEAR[linear["name"]]
    return (match["module"], match["parameter"]) if match else None


def _separate_parameters(parts: Mapping[tuple[int, str], Tensor]) -> Iterator[ExpertParameter]:
    count = 1 + max(expert for expert, _ in parts)
    for parameter, spellings in _PARTS.items():
        for names in spellings:
            stacks = [[parts.get((expert, name)) for name in names] for expert in range(count)]
            tensors = [[tensor for tensor in stack if tensor is not None] for stack in stacks]
            shapes = {tuple(tensor.shape for tensor in stack) for stack in tensors}
            if len(shapes) == 1 and len(first := tensors[0]) == len(names):
                rows, columns = sum(tensor.shape[0] for tensor in first), first[0].shape[1]
                stored = tuple(tuple(tensor.name for tensor in stack) for stack in tensors)
                yield ExpertParameter(parameter, count, rows, columns, stored)


def fits(
    factors: Mapping[str, tuple[Tensor, Tensor]], parameters: Mapping[str, ExpertParameter], targets: tuple[str, ...], type_: str
) -> list[tuple[Fit, ...]]:
    """All ways in which the factors (A and B by the nested module that they are stored for) may belong to the parameters.

    `targets` are the adapter's `target_parameters`, `type_` the base's model type.
    """
    named = [p for p in parameters.values() if not targets or any(target.rpartition(".")[2] == p.name for target in targets)]
    found = []
    for chosen in permutations(named, len(factors)):
        for turned in (True,) if type_ in INPUTS_FIRST else (False, True):
            pairs = zip(chosen, factors.items(), strict=True)
            if all(_fits(parameter, *pair, turned) for parameter, (_, pair) in pairs):
                found.append(tuple(Fit(p, module, turned) for p, module in zip(chosen, factors, strict=True)))
    return found


def _fits(parameter: ExpertParameter, a: Tensor, b: Tensor, turned: bool) -> bool:
    outputs, inputs = (parameter.columns, parameter.rows) if turned else (parameter.rows, parameter.columns)
    if turned and not parameter.is_one:
        return False
    return a.shape[-1] == inputs and b.shape[-2] == outputs and rank_of(parameter, a, b) is not None


def rank_of(parameter: ExpertParameter, a: Tensor, b: Tensor) -> int | None:
    """The rank that these factors have for each expert, which may share one of them; None where they are none of its."""
    of_a = _ranks(parameter.experts, a.shape, a.shape[-2])
    of_b = _ranks(parameter.experts, b.shape, b.shape[-1])
    return next((rank for rank in of_a if rank in of_b and rank > 0), None)


def _ranks(experts: int, shape: tuple[int, ...], size: int) -> list[int]:
    """Ranks that a factor of this shape may have: of a part for each expert, or shared."""
    if len(shape) == 3:
        return [size] if shape[0] == experts else []
    return [*([size // experts] if size % experts == 0 else []), size]


def nested_module(module: str) -> str:
    """The module of experts that nested factors belong to."""
    return _NESTED.sub("", module, count=1)


def expert_slice(tensor: Tensor, expert: int) -> RowsTensor:
    """One expert's part of a tensor that has them all."""
    return RowsTensor(f"{tensor.name}[{expert}]", (tensor,), (np.array([expert], np.int32),), np.zeros(1, np.int16))


def joined_experts(model: str, tensor: Tensor, experts: list[Tensor]) -> Joined:
    """All experts' changed parts as one tensor again."""
    return Joined(tensor.name, tensor.shape, tuple(Source(model, expert) for expert in experts))


def rows_of_parts(parameter: ExpertParameter, tensors: Mapping[str, Tensor]) -> list[slice]:
    """The rows of a parameter that each of an expert's tensors holds."""
    ends = np.cumsum([tensors[name].shape[0] for name in parameter.stored[0]]).tolist()
    return [slice(start, stop) for start, stop in zip([0, *ends[:-1]], ends, strict=True)]


class StackedAdapter:
    """The part of an adapter that changes parameters with all experts of a layer.

    `low_rank` makes a changed tensor of one, its A and B, the parameter's name, and True if they are of the transpose.
    """

    def __init__(
        self,
        adapter: Checkpoint,
        base: Checkpoint,
        config: AdapterConfig,
        packing: Packing | None,
        low_rank: Callable[[Tensor, Tensor, Tensor, str, bool], Tensor],
        error: Callable[[str], InputError],
    ) -> None:
        self.adapter, self.config, self.packing, self.low_rank, self.error = adapter, config, packing, low_rank, error
        self.type = base.model_type
        self.stored = base.tensors.keys()
        self.parameters = expert_parameters(base.tensors)

    def of_experts(self, modules: Mapping[str, dict[str, Tensor]]) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The parts by the nested module that they are stored for, of all modules of experts by their names."""
        found: dict[str, dict[str, dict[str, Tensor]]] = {}
        for module, parts in modules.items():
            stem = nested_module(module)
            if plain_name(stem) in self.parameters and f"{stem}.weight" not in self.stored:
                found.setdefault(stem, {})[module] = parts
        return found

    def changed(
        self, module: str, factors: Mapping[str, tuple[Tensor, Tensor]], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The changed ones of the `tensors`, by A and B for each nested module. InputError where these fit none, or several."""
        parameters = self.parameters[plain_name(module)]
        ways = fits(factors, parameters, tuple(self.config.target_parameters), self.type)
        if len(ways) > 1 and self.config.knows_layouts:  # then of a square the inputs are its columns
            ways = [way for way in ways if not way[0].turned]
        if not ways:
            shapes = ", ".join(f"{p.name} {[p.experts, p.rows, p.columns]}" for p in parameters.values())
            sizes = " and ".join(f"{list(a.shape)}, {list(b.shape)}" for a, b in factors.values())
            raise self.error(
                f"the factors of {module!r} have shapes {sizes}, which fit none of the base's parameters ({shapes}): "
                "was the adapter trained on this base?"
            )
        if len(ways) > 1:
            raise self.error(
                f"tensor {next(iter(factors.values()))[1].name!r} may be of a parameter or of its transpose, and "
                f"{ADAPTER_CONFIG} does not say by which peft it was written: merge it into its base with peft "
                "(merge_and_unload) and name the resulting folder"
            )
        found: dict[str, Tensor] = {}
        for fit in ways[0]:
            found |= self._parameter(f"{module}.{fit.parameter.name}", fit, *factors[fit.module], tensors)
        return found

    def _parameter(self, key: str, fit: Fit, a: Tensor, b: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The changed tensors of one parameter."""
        parameter, rank = fit.parameter, rank_of(fit.parameter, a, b) or 0
        self._check(key, a, b, rank, parameter)
        experts, packing = parameter.experts, self.packing or "interleaved"
        a_E, b_E = StackedFactor(a, experts, rank, is_a=True), StackedFactor(b, experts, rank, is_a=False, packing=packing)
        if parameter.is_one:
            whole = tensors[parameter.stored[0][0]]
            parts = [self.low_rank(expert_slice(whole, e), a_E.of(e), b_E.of(e), key, fit.turned) for e in range(experts)]
            return {whole.name: joined_experts(self.adapter.name, whole, parts)}
        rows = rows_of_parts(parameter, tensors)
        return {
            name: self.low_rank(tensors[name], a_E.of(expert), b_E.of(expert, part), key, False)
            for expert, names in enumerate(parameter.stored)
            for name, part in zip(names, rows, strict=True)
        }

    def _check(self, key: str, a: Tensor, b: Tensor, rank: int, parameter: ExpertParameter) -> None:
        """InputError for factors that are no floats, of another rank than the settings say, or in an order that is not known."""
        other = next((tensor for tensor in (a, b) if not tensor.dtype.is_float), None)
        if other is not None:
            raise self.error(f"tensor {other.name!r} is of type {other.dtype.name}: only float tensors can be adapted")
        if rank != self.config.rank(key):
            raise self.error(
                f"{key!r} has rank {rank}, but {ADAPTER_CONFIG} gives it {self.config.rank(key)}: the two files do not belong "
                "together"
            )
        several = len(b.shape) == 2 and rank > 1 and parameter.experts > 1 and b.shape[1] > rank
        if self.config.by_unsloth and several and self.packing is None:
            raise self.error(
                f"tensor {b.name!r} holds all experts, and Unsloth, which wrote it, packs them in another order than peft "
                "in some versions: say which it is, 'packing: interleaved' (peft's) or 'packing: blocks', beside the expert's "
                "model"
            )
