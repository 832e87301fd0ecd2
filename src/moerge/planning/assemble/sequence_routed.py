"""A sequence-routed MoE of our own architecture: some roles shared, some one for each expert (MergeME, section 3.1.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moerge.architecture.config import portable_config
from moerge.architecture.sequence import MODEL_TYPE, expand, gate
from moerge.errors import InputError
from moerge.modeling import AUTO_MAP, FAMILIES, role_of
from moerge.planning.assemble.adapters import kept_adapters, kept_note
from moerge.planning.assemble.common import Assembled, Assembly
from moerge.recipe.schema import MoE
from moerge.routers.sequence import SequenceRouter


def assemble_sequence_routed(assembly: Assembly) -> Assembled:
    """The MoE as the recipe asks for it; InputError where it cannot be made of such experts."""
    moe = assembly.recipe.moe
    assert moe is not None and isinstance(moe.router, SequenceRouter)
    dense = _expert_config(assembly, moe)
    experts, tied = assembly.recipe.expert_names, bool(dense.get("tie_word_embeddings"))
    if not tied and not any(tensor.role == "head" for tensor in assembly.candidates):
        raise InputError(f"cannot build a sequence-routed model: {assembly.source} has no head, so it is no language model")
    stored = [tensor for tensor in assembly.candidates if not (tied and tensor.name.startswith("lm_head."))]
    by_role = {tensor.role or tensor.name: tensor for tensor in stored}
    plain = [replace(tensor, role=tensor.role or tensor.name) for tensor in stored]
    outputs, keeps = [], moe.adapters == "keep"
    try:
        expanded = list(expand(plain, len(experts), () if keeps else moe.separate))
    except ValueError as error:
        raise InputError(f"cannot build a sequence-routed model: {error}") from None
    for tensor in expanded:
        original = by_role[tensor.dense_role]
        if tensor.expert is not None:
            operation = assembly.copied(experts[tensor.expert], original.name)
        elif keeps and role_of(original.name) in moe.separate:
            operation = assembly.copied("base", original.name)
        else:
            operation = assembly.merged(original, experts)
        outputs.append(assembly.output(tensor, operation))
    assembly.resolver.check_all_used()
    routing = moe.router.routing(moe.top_k)
    if routing["kind"] == "learned":
        router = gate(len(experts), dense["hidden_size"])
        outputs.append(assembly.output(router, moe.router.operation(router)))
    config = _routed_config(moe, dense, experts, routing)
    if not keeps:
        return Assembled(config, outputs, experts)
    config["adapters"], factors = kept_adapters(assembly, dense)
    return Assembled(config, [*outputs, *factors], experts, notes=(kept_note(outputs, factors, moe.separate, len(experts)),))


def _expert_config(assembly: Assembly, moe: MoE) -> dict[str, Any]:
    """The dense config that all experts share."""
    model = assembly.leader
    if model.model_type not in FAMILIES:
        raise InputError(
            f"moe.format: experts of type {model.model_type!r} cannot be routed by sequence (it takes: {', '.join(FAMILIES)})"
        )
    dense = portable_config(model.written, family=model.family, dtype=str(assembly.dtype.torch_name))
    if dense.get("tie_word_embeddings") and ("embedding" in moe.separate) != ("head" in moe.separate):
        raise InputError("moe.separate: embedding and head are tied in these models: keep both separate or neither")
    layers = getattr(moe.router, "layers", None) or ()
    if any(layer >= dense["num_hidden_layers"] for layer in layers):
        raise InputError(f"moe.router.layers: layer {max(layers)}, but the models have {dense['num_hidden_layers']} (from 0)")
    return dense


def _routed_config(moe: MoE, dense: Mapping[str, Any], experts: Sequence[str], routing: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a sequence-routed model of experts with this config."""
    config: dict[str, Any] = {"architectures": ["MoergeForCausalLM"], "model_type": MODEL_TYPE, "auto_map": AUTO_MAP}
    config["expert_config"] = {key: dense[key] for key in dense if key not in ("torch_dtype", "transformers_version")}
    config |= {"expert_names": list(experts), "separate": list(moe.separate), "mix": moe.mix, "routing": routing}
    config |= {key: dense[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in dense}
    return {**config, "dtype": dense["dtype"]}
