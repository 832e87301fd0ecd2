"""Merging what is already in memory: dicts of NumPy arrays or torch tensors, through the same methods and executor."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moerge.errors import InputError
from moerge.execution.executor import Executor
from moerge.merging.array_statistics import bind_arrays, from_arrays
from moerge.methods.method import MergeMethod, cancel, merge_method
from moerge.methods.statistical import StatisticsMethod
from moerge.operations.operations import Merge, Output
from moerge.recipe.document import Document
from moerge.statistics.files import Used
from moerge.tensors.dtypes import BF16, FLOATS
from moerge.tensors.source import Source
from moerge.tensors.tensor import ArrayTensor
from moerge.tensors.threads import default_threads


def merge_state_dicts(
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]],
    *,
    method: str | MergeMethod,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]] | None = None,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    **parameters: Any,
) -> dict[str, Any]:
    """Merge state dicts that share names and shapes; `parameters` are the method's, such as density=0.8.

    `method` is a name, or a method object with its parameters, such as `Ties(density=0.8)`.

    Values are NumPy arrays (float32, float16, or ml_dtypes' bfloat16) or torch tensors on the CPU; the result has the kind
    and element types of `base`, or of the first expert where the method needs no base. Experts are called "expert0", ...
    unless given by name, which is what seeded methods draw by. The inputs are not changed. `statistics` are for methods that
    need them, one dict an expert: fisher's have the mean squared gradient of each tensor under its name, regmean's the mean of
    x^T x over the inputs x of each linear layer [out, in] under that of its weight; other tensors are averaged.
    Raises InputError for differing names or shapes, and for unknown methods or parameters.
    """
    chosen = _method(method, parameters)
    named = dict(experts) if isinstance(experts, Mapping) else {f"expert{i}": expert for i, expert in enumerate(experts)}
    if not named:
        raise InputError("merge_state_dicts needs at least one expert")
    chosen.check_experts(list(named))
    chosen = chosen.for_experts(list(named))
    if chosen.uses_task_vectors and base is None:
        raise InputError(f"{chosen.name} works on task vectors (expert minus base), so it needs a base{chosen.or_without_base}")
    if chosen.exact_experts not in (None, len(named)):
        plural = "s" if chosen.exact_experts != 1 else ""
        raise InputError(f"{chosen.name} merges exactly {chosen.exact_experts} state dict{plural}, not {len(named)}")
    factors = _factors(chosen, weights, list(named))
    used = _statistics(chosen, list(named), statistics)
    used_base = base if chosen.uses_task_vectors else None
    like = used_base if used_base is not None else next(iter(named.values()))
    _check_names(like, named)
    outputs = []
    for name in like:
        sources = tuple(Source(expert, _tensor(expert, name, tensors[name])) for expert, tensors in named.items())
        base_source = Source("base", _tensor("base", name, used_base[name])) if used_base is not None else None
        target = (base_source or sources[0]).tensor
        _check_shapes(target.shape, sources)
        operation = Merge(chosen, sources, factors, base_source)
        outputs.append(Output(name, "", target.dtype, target.shape, bind_arrays(operation, used) if used else operation))
    store = _Memory(outputs)
    Executor(store, allow_nonfinite).run(outputs, threads or default_threads())
    return {output.name: _like(like[output.name], store.arrays[output.name], output) for output in outputs}


def _method(method: str | MergeMethod, parameters: Mapping[str, Any]) -> MergeMethod:
    if isinstance(method, str):
        return Document({}, f"merge_state_dicts(method={method!r})").build(merge_method(method), dict(parameters))
    if parameters:
        raise InputError(f"merge_state_dicts: {next(iter(parameters))!r} has no effect: the method object has its parameters")
    return method


class _Memory:
    """A Store of arrays."""

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.arrays = {output.name: np.empty(output.size, output.dtype.storage) for output in outputs}

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        self.arrays[output.name][start : start + data.size] = data

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        pass

    def finished(self, output: Output) -> bool:
        return False


def _factors(method: MergeMethod, weights: Sequence[float] | None, experts: Sequence[str]) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * len(experts)
    factors = tuple(float(weight) for weight in weights)
    if len(factors) != len(experts):
        raise InputError(f"there are {len(experts)} experts but {len(factors)} weights")
    if not method.uses_weights and set(factors) != {1.0}:
        raise InputError(f"{method.name} ignores weights: use 'linear', or leave them out")
    for expert, factor in zip(experts, factors, strict=True):
        if not math.isfinite(factor):
            raise InputError(f"{expert} has the weight {factor}: weights must be finite")
    if method.divides_by_weights and cancel(factors):
        raise InputError("the weights sum to zero, so they cannot be normalized")
    return factors


def _statistics(
    method: MergeMethod, experts: Sequence[str], statistics: Sequence[Mapping[str, Any]] | Mapping[str, Mapping[str, Any]] | None
) -> list[Used]:
    if not isinstance(method, StatisticsMethod):
        if statistics is not None:
            raise InputError(f"{method.name} uses no statistics: leave them out")
        return []
    if method.statistics is not None:
        raise InputError(f"{method.name}: state dicts are merged with statistics in memory, not with those in a folder")
    if isinstance(statistics, Mapping):
        statistics = [statistics[name] for name in experts if name in statistics]
    if statistics is None or len(statistics) != len(experts):
        raise InputError(f"{method.name} needs 'statistics': one dict for each of {len(experts)} experts")
    return [from_arrays(method, expert, arrays) for expert, arrays in zip(experts, statistics, strict=True)]


def _check_names(like: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]]) -> None:
    for expert, tensors in named.items():
        odd = sorted(like.keys() ^ tensors.keys())
        if odd:
            raise InputError(f"{expert}: tensor {odd[0]!r} is not in all state dicts")


def _check_shapes(shape: tuple[int, ...], sources: Sequence[Source]) -> None:
    for source in sources:
        if source.tensor.shape != shape:
            raise InputError(f"{source.model}: tensor {source.tensor.name!r} has shape {source.tensor.shape}, expected {shape}")


def _is_torch(value: Any) -> bool:
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def _tensor(model: str, name: str, value: Any) -> ArrayTensor:
    kind = getattr(value, "dtype", type(value).__name__)
    dtype = FLOATS.get(str(kind).removeprefix("torch."))
    if dtype is None:
        raise InputError(f"{model}: tensor {name!r} is {kind}; {', '.join(sorted(FLOATS))} can be merged")
    shape = tuple(value.shape)
    if _is_torch(value):
        value = value.detach().cpu().contiguous()
        value = (value.view(sys.modules["torch"].uint16) if dtype is BF16 else value).numpy()
    return ArrayTensor(name, dtype, shape, np.ascontiguousarray(value).reshape(-1).view(dtype.storage))


def _like(value: Any, flat: np.ndarray, output: Output) -> Any:
    if not _is_torch(value):
        return flat.view(value.dtype).reshape(output.shape)
    torch = sys.modules["torch"]
    tensor = torch.from_numpy(flat)
    return (tensor.view(torch.bfloat16) if output.dtype is BF16 else tensor).reshape(output.shape).to(value.device)
