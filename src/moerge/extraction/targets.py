"""The choice of tensors of a task vector that become low-rank, are stored whole, or are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moerge.checkpoint.adapter import holds_vocabulary, stores_inputs_first, ties_head
from moerge.errors import InputError, suggest
from moerge.extraction.experts import ExpertsTarget, expert_tensors, experts_targets
from moerge.extraction.naming import ModuleNames
from moerge.operations.operations import Merge, Output
from moerge.planning.plan import Plan
from moerge.recipe.rules import matches
from moerge.tensors.source import Source

_PROJECTION = re.compile(r"layers\.\d+\.(attention|cross_attention|linear_attention|ssm|ffn)\.[a-z_0-9]*[a-z_][a-z_0-9]*")
_EXPERT = re.compile(r"\.ffn\.\d+\.|\.experts\b")
_OTHERS = re.compile(r"embed|norm|wte|wpe|lm_head|router|ln_|\bgate\b")


@dataclass(frozen=True)
class Target:
    """One tensor of the task vector, by its `name` in memory.

    `kind` is what becomes of it: `lora`, `embedding` (LoRA of one), `whole`, or `left out`.
    """

    output: Output
    kind: str
    name: str
    transposed: bool = False

    @property
    def module(self) -> str:
        """The module that it belongs to, as peft calls it."""
        return self.name.rpartition(".")[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.output.nbytes

    @property
    def pair(self) -> tuple[Source, Source]:
        """Base and expert."""
        operation = self.output.operation
        assert isinstance(operation, Merge) and operation.base is not None
        return operation.base, operation.experts[0]

    @property
    def role(self) -> str:
        """Its role or name, for all layers together."""
        return re.sub(r"\.\d+(?=\.|$)", ".*", self.output.role or self.output.name)


def choose_targets(plan: Plan, modules: Sequence[str], whole: Sequence[str], names: ModuleNames) -> list[Target | ExpertsTarget]:
    """Every tensor of the plan that has a task vector; by default attention and feed-forward matrices become low-rank.

    `modules` are patterns (as in a recipe's overrides) of what becomes low-rank
    instead, `whole` of what is stored as it is.
    Raises InputError for a pattern that matches nothing, or something that cannot become low-rank.
    """
    outputs = [o for o in plan.outputs if isinstance(o.operation, Merge) and o.operation.base is not None]
    low_rank, stored = _matched(outputs, modules, "--modules"), _matched(outputs, whole, "--modules-to-save")
    saved = {output.name.rpartition(".")[0] for output in outputs if output.name in stored}
    base = plan.models[0]
    tied = ties_head(base)
    mixture = expert_tensors(base)
    of_experts = [output for output in outputs if output.name in mixture and output.name not in stored]
    asked = {output.name for output in of_experts if not modules or output.name in low_rank} if names.memory else set()
    experts = experts_targets(plan, of_experts, asked, names.memory)
    grouped = {output.name for target in experts for stack in target.outputs for output in stack}
    untrained = asked - grouped
    for name, pattern in {**low_rank, **stored}.items():
        _check_head(name, pattern, base.model_type, tied)
        if name not in names.by_file and name not in asked:
            raise InputError(f"pattern {pattern!r} matches tensor {name!r}, which is none by itself in memory: leave it out")
    found: list[Target | ExpertsTarget] = list(experts)
    for output in outputs:
        if output.name in grouped or output.name in untrained:
            continue
        module = output.name.rpartition(".")[0]
        wanted = output.name in low_rank if modules else _is_projection(output) and output.name in names.by_file
        if module in saved:
            found.append(Target(output, "whole", names.by_file.get(output.name, "")))
        elif not wanted:
            found.append(Target(output, "left out", names.by_file.get(output.name, "")))
        else:
            _check(output, low_rank.get(output.name, ""), tied)
            embedding = _is_embedding(output)
            transposed = embedding or stores_inputs_first(base.model_type, module)
            found.append(Target(output, "embedding" if embedding else "lora", names.by_file.get(output.name, ""), transposed))
    return found


def _matched(outputs: Sequence[Output], patterns: Sequence[str], option: str) -> Mapping[str, str]:
    """Names of tensors, and the pattern that matched; biases are not asked for by patterns of low-rank modules."""
    found: dict[str, str] = {}
    for pattern in patterns:
        names = [o.name for o in outputs if matches(pattern, o.role, o.name)]
        if option == "--modules":
            names = [o.name for o in outputs if o.name in names and (o.name.endswith(".weight") or len(o.shape) == 3)]
        if not names:
            known = {re.sub(r"^layers\.\d+\.", "", output.role) or output.name for output in outputs}
            raise InputError(f"{option}: {pattern!r} matches no tensor, {suggest(pattern, known)}", code="unknown-name")
        found |= dict.fromkeys(names, pattern)
    return found


def _is_projection(output: Output) -> bool:
    if len(output.shape) != 2 or not output.name.endswith(".weight") or _EXPERT.search(f"{output.role} {output.name}"):
        return False
    if output.role:
        return bool(_PROJECTION.fullmatch(output.role))
    return bool(re.search(r"\.\d+\.", output.name)) and not _OTHERS.search(output.name)


def _check_head(name: str, pattern: str, model_type: str, tied: bool) -> None:
    """GPT-NeoX' head is another module in transformers 4 than in 5, and peft ignores a module that is not there."""
    if model_type == "gpt_neox" and (name == "embed_out.weight" or (tied and name.endswith("embed_in.weight"))):
        raise InputError(
            f"pattern {pattern!r} matches tensor {name!r}, the head or tied to it: leave it out, since GPT-NeoX' head is "
            "called embed_out in transformers 4 and lm_head in 5, and no adapter of it works in both"
        )


def _is_embedding(output: Output) -> bool:
    return output.role.startswith("embedding") or bool(re.search(r"(^|\.)(embed_tokens|embed_in|wte|wpe)\.weight$", output.name))


def _check(output: Output, pattern: str, tied: bool) -> None:
    where = f"--modules: {pattern!r} matches tensor {output.name!r}, which"
    if len(output.shape) != 2:
        raise InputError(f"{where} is no matrix: name it with --modules-to-save, or leave it out")
    if _EXPERT.search(f"{output.role} {output.name}"):
        raise InputError(f"{where} belongs to an expert of a MoE, whose name in memory is not known: leave it out")
    if tied and holds_vocabulary(output.name):
        raise InputError(f"{where} the base ties (embedding and head are one tensor): name it with --modules-to-save")
