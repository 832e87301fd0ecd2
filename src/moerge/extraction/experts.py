"""Experts of a mixture as targets: all of a layer are one parameter in memory, and one pair of factors in an adapter."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moerge.checkpoint.fused_experts import INPUTS_FIRST, ExpertParameter, expert_parameters, expert_slice
from moerge.checkpoint.module_names import plain_name
from moerge.checkpoint.reader import Checkpoint
from moerge.errors import InputError
from moerge.extraction.task_vector import task_vector
from moerge.operations.operations import Merge, Output
from moerge.planning.plan import Plan
from moerge.tensors.source import Source


@dataclass(frozen=True)
class ExpertsTarget:
    """A parameter with all experts of a layer, by its `module` in memory; `outputs` are its tensors, as in its `stored`.

    `turned` if it is [inputs, outputs]; `nested` if peft wraps another parameter of the module around it.
    """

    parameter: ExpertParameter
    module: str
    turned: bool
    outputs: tuple[tuple[Output, ...], ...]
    nested: bool = False
    kind = "lora"

    @property
    def name(self) -> str:
        """The parameter's name in memory."""
        return f"{self.module}.{self.parameter.name}"

    @property
    def role(self) -> str:
        """Its name for all layers together."""
        return re.sub(r"\.\d+(?=\.)", ".*", plain_name(self.name))

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(output.nbytes for stack in self.outputs for output in stack)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs of one expert."""
        rows, columns = self.parameter.rows, self.parameter.columns
        return (columns, rows) if self.turned else (rows, columns)

    @property
    def factor_names(self) -> tuple[str, str]:
        """The names of A and B, without what peft puts before them."""
        module = f"{self.module}.base_layer" if self.nested else self.module
        return f"{module}.lora_A.weight", f"{module}.lora_B.weight"

    def task_vector(self, expert: int) -> np.ndarray:
        """One expert's task vector [O, I]."""
        tau = np.concatenate([task_vector(*pair) for pair in self._pairs(expert)])
        tau_RC = tau.reshape(self.parameter.rows, self.parameter.columns)
        return np.ascontiguousarray(tau_RC.T) if self.turned else tau_RC

    def _pairs(self, expert: int) -> Iterator[tuple[Source, Source]]:
        for output in self.outputs[0 if self.parameter.is_one else expert]:
            operation = output.operation
            assert isinstance(operation, Merge) and operation.base is not None
            pair = (operation.base, operation.experts[0])
            if self.parameter.is_one:
                pair = (_sliced(pair[0], expert), _sliced(pair[1], expert))
            yield pair

    def is_trained(self) -> bool:
        """Return whether any expert differs from the base; reads up to the first that does."""
        return any(self.task_vector(expert).any() for expert in range(self.parameter.experts))

    def packed(self, factors: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, int]:
        """A [E * K, I] and B [O, K * E] as peft packs them, of each expert's left [O, k] and right [k, I]; and K, the largest."""
        outputs, inputs = self.shape
        rank = max(1, *(right.shape[0] for _, right in factors))
        a_EKI = np.zeros((len(factors), rank, inputs), np.float32)
        b_OKE = np.zeros((outputs, rank, len(factors)), np.float32)
        for expert, (left, right) in enumerate(factors):
            a_EKI[expert, : right.shape[0]] = right
            b_OKE[:, : left.shape[1], expert] = left
        return a_EKI.reshape(-1, inputs), b_OKE.reshape(outputs, -1), rank


def _sliced(source: Source, expert: int) -> Source:
    return Source(source.model, expert_slice(source.tensor, expert))


def expert_tensors(base: Checkpoint) -> frozenset[str]:
    """The names of all tensors that are experts' or hold experts."""
    parameters = (parameter for module in expert_parameters(base.tensors).values() for parameter in module.values())
    return frozenset(name for parameter in parameters for stack in parameter.stored for name in stack)


def experts_targets(
    plan: Plan, outputs: Sequence[Output], wanted: Collection[str], memory: Collection[str]
) -> list[ExpertsTarget]:
    """The parameters in memory of which all tensors are `wanted`, and at least one expert differs from the base.

    `memory` are the names of tensors in memory. Raises InputError where a part of what is one there is wanted.
    """
    base, by_name = plan.models[0], {output.name: output for output in outputs}
    modules = {plain_name(name.rpartition(".")[0]): name.rpartition(".")[0] for name in memory if ".experts." in name}
    found: list[ExpertsTarget] = []
    for plain, parameters in expert_parameters(base.tensors).items():
        chosen = []
        for parameter in parameters.values():
            names = [name for stack in parameter.stored for name in stack]
            asked = [name for name in names if name in wanted]
            if 0 < len(asked) < len(names):
                missing = next(name for name in names if name not in wanted)
                raise InputError(
                    f"--modules names tensor {asked[0]!r}, and not {missing!r}, which is one with it in memory: name both"
                )
            if asked and plain in modules:
                stacks = tuple(tuple(by_name[name] for name in stack) for stack in parameter.stored)
                chosen.append(ExpertsTarget(parameter, modules[plain], base.model_type in INPUTS_FIRST, stacks))
        trained = [target for target in chosen if target.is_trained()]
        found += [replace(target, nested=number < len(trained) - 1) for number, target in enumerate(trained)]
    return found


def target_parameters(targets: Sequence[ExpertsTarget], memory: Collection[str]) -> list[str]:
    """peft's names for them: short ones where these mean no others."""
    wanted = {target.name for target in targets}
    short = {".".join(name.split(".")[-2:]) for name in wanted}
    meant = {name for name in memory if any(name.endswith(f".{end}") for end in short)}
    return sorted(short if meant == wanted else wanted)
