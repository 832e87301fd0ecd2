"""A native token-routed MoE: feed-forward tensors copied, one module an expert, the rest merged (BTX; MergeME, section 3.1.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moerge.architecture import ExpectedTensor, moe_format
from moerge.architecture.config import portable_config
from moerge.architecture.moe_format import GROUPED_BYTES
from moerge.architecture.parts import part_of
from moerge.errors import InputError
from moerge.operations.fitter import MODULE
from moerge.operations.operations import Draw, Operation, Output
from moerge.planning.assemble.common import Assembled, Assembly
from moerge.planning.checks import expected_of


def assemble_token_routed(assembly: Assembly) -> Assembled:
    """The MoE in the recipe's format; InputError where the format has no place for what the experts have."""
    moe = assembly.recipe.moe
    assert moe is not None
    config = assembly.leader.config
    chosen = moe_format(moe.format, config)
    unknown = next((tensor.name for tensor in assembly.candidates if not tensor.role), None)
    if unknown:
        way = f"'parts: {{{part_of(unknown, config.get('num_hidden_layers'))}: drop}}' leaves its part out"
        raise InputError(f"cannot build a {chosen.name} model: it has no place for tensor {unknown!r}: {way}")
    experts = assembly.recipe.expert_names
    converted = chosen.convert(config, len(experts), moe.top_k)
    dense = {tensor.role: tensor for tensor in assembly.candidates}
    if "head" not in dense and not converted.get("tie_word_embeddings"):
        raise InputError(f"cannot build a {chosen.name} model: {assembly.source} has no head, so it is no language model")
    outputs = []
    for tensor in expected_of(replace(assembly.leader, family=chosen.family).with_written(converted), chosen.name):
        operation: Operation
        if tensor.role.endswith(".router"):
            operation = moe.router.operation(tensor)
        elif _among(chosen.zero_roles, tensor):
            operation = Draw(seed=0, bound=0.0)
        elif _among(chosen.random_roles, tensor):
            operation = Draw.of_linear(tensor.shape[-1])
        elif tensor.parts or tensor.expert is not None:
            operation = _kept(assembly, tensor, dense, experts)
        else:
            operation = assembly.merged(dense[tensor.role], experts)
        outputs.append(assembly.output(tensor, operation))
    assembly.resolver.check_all_used()
    made = portable_config(converted, family=chosen.family, dtype=str(assembly.dtype.torch_name))
    warnings = filter(None, (chosen.warning(config), _unaligned(outputs)))
    return Assembled(made, outputs, experts, tuple(warnings))


def _unaligned(outputs: Sequence[Output]) -> str | None:
    """A warning about experts that transformers 5 does not run as it is set up."""
    kept = [output for output in outputs if MODULE.search(output.role) and len(output.shape) > 1]
    odd = {size for output in kept for size in output.shape[-2:] if size * output.dtype.itemsize % GROUPED_BYTES}
    if not odd:
        return None
    return (
        f"transformers 5 multiplies experts by a product that takes rows of multiples of {GROUPED_BYTES} bytes, and theirs have "
        f"{min(odd)} elements: load the result with experts_implementation='eager'"
    )


def _kept(assembly: Assembly, tensor: ExpectedTensor, dense: Mapping[str, ExpectedTensor], experts: tuple[str, ...]) -> Operation:
    """An expert's own tensor, or that of all experts joined where the format stores them as one."""
    if tensor.parts:
        return assembly.joined(tensor, experts, [dense[role].name for role in tensor.parts])
    assert tensor.expert is not None
    return assembly.copied(experts[tensor.expert], dense[tensor.dense_role].name)


def _among(beginnings: Sequence[str], tensor: ExpectedTensor) -> bool:
    role = tensor.role.split(".", 2)[-1]
    return any(role == beginning or role.startswith(f"{beginning}.") for beginning in beginnings)
