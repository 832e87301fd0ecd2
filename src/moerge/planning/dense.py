"""A dense model: every tensor merged."""

from __future__ import annotations

from moerge.architecture.config import portable
from moerge.planning.assembly import Assembled, Assembly
from moerge.planning.match import MethodChooser


def assemble_dense(assembly: Assembly) -> Assembled:
    """All tensors of the experts, merged; InputError for an override that means none of them."""
    chooser, experts = MethodChooser(assembly.recipe), tuple(assembly.recipe.experts)
    outputs = [assembly.output(tensor, assembly.merged(tensor, chooser, experts)) for tensor in assembly.candidates]
    chooser.check_all_used()
    config = assembly.models[assembly.source].config
    return Assembled(portable(config, family=assembly.family, dtype=str(assembly.dtype.torch_name)), outputs)
