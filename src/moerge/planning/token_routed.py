"""A native token-routed MoE: feed-forward tensors copied, one module an expert, the rest merged (BTX; MergeME, section 3.1.1)."""

from __future__ import annotations

from moerge.architecture import moe_format
from moerge.architecture.config import canonical, portable
from moerge.errors import InputError
from moerge.planning.assembly import Assembled, Assembly
from moerge.planning.checks import expected_of
from moerge.planning.match import MethodChooser
from moerge.planning.operations import Operation


def assemble_token_routed(assembly: Assembly) -> Assembled:
    """The MoE in the recipe's format; InputError where the format has no place for what the experts have."""
    moe = assembly.recipe.moe
    assert moe is not None
    model = assembly.models[assembly.source]
    chosen = moe_format(moe.format, model.model_type)
    config = canonical(model.config, assembly.family)
    obstacle = chosen.obstacle(config)
    unknown = next((tensor.name for tensor in assembly.candidates if not tensor.role), None)
    if obstacle or unknown:
        raise InputError(f"cannot build a {chosen.name} model: {obstacle or f'it has no place for tensor {unknown!r}'}")
    experts = assembly.recipe.expert_names
    converted = chosen.convert(config, len(experts), moe.top_k)
    chooser = MethodChooser(assembly.recipe)
    dense = {tensor.role: tensor for tensor in assembly.candidates}
    outputs = []
    for tensor in expected_of(chosen.family, converted, chosen.name):
        operation: Operation
        if tensor.role.endswith(".router"):
            operation = moe.router.operation(tensor)
        elif tensor.expert is not None:
            operation = assembly.copied(experts[tensor.expert], dense[tensor.dense_role].name)
        else:
            operation = assembly.merged(dense[tensor.role], chooser, experts)
        outputs.append(assembly.output(tensor, operation))
    chooser.check_all_used()
    return Assembled(portable(converted, family=chosen.family, dtype=str(assembly.dtype.torch_name)), outputs, experts)
