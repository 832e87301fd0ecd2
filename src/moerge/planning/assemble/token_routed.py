"""A native token-routed MoE: feed-forward tensors copied, one module an expert, the rest merged (BTX; MergeME, section 3.1.1)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moerge.architecture import ExpectedTensor, family_of
from moerge.architecture.config import normalized_config, portable_config
from moerge.architecture.family import Family, expected_tensors
from moerge.architecture.mixture import is_routed
from moerge.architecture.moe_format import GROUPED_BYTES, MoEFormat
from moerge.architecture.parts import part_of
from moerge.errors import InputError
from moerge.methods.average import Linear
from moerge.operations.fitter import MODULE
from moerge.operations.operations import Copy, Draw, Merge, Operation, Output
from moerge.planning.assemble.common import Assembled, Assembly
from moerge.planning.assemble.from_mixtures import config_of, format_of, router_operation, unlike_mixtures
from moerge.planning.assemble.token_format import token_format
from moerge.recipe.schema import MoE, layers_in
from moerge.routers.sequence import FORMAT

_SHARED, _SHARED_GATE = "ffn.shared.", "ffn.shared_gate"
_OUTPUT = re.compile(r"\.down(\.bias)?$")
_HALF_OPEN = 1e-6
"""The deviation of a shared expert's gate: its sigmoid is 1/2 to five digits, and llama.cpp cannot compute that of 0."""


def assemble_token_routed(assembly: Assembly) -> Assembled:
    """The MoE in the recipe's format; InputError where the format has no place for what the experts have."""
    moe = assembly.recipe.moe
    assert moe is not None
    config = assembly.leader.config
    chosen = token_format(assembly, moe) if moe.format == FORMAT else format_of(assembly.leader, moe.format)
    unknown = next((tensor.name for tensor in assembly.candidates if not tensor.role), None)
    if unknown:
        way = f"'parts: {{{part_of(unknown, config.get('num_hidden_layers'))}: drop}}' leaves its part out"
        raise InputError(f"cannot build a {chosen.name} model: it has no place for tensor {unknown!r}: {way}")
    experts = assembly.recipe.expert_names
    dense = {_as_ffn(tensor.dense_role or tensor.role, chosen): tensor for tensor in assembly.candidates}
    if not chosen.family.tensors and chosen.name != FORMAT:
        config = {**config, "intermediate_size": _width(chosen, dense)}
        converted = {**assembly.leader.written, **chosen.convert(config, len(experts), moe.top_k)}
    else:
        converted = config_of(assembly.leader, chosen, len(experts), moe.top_k)
    converted |= _shared(moe, chosen, config) | _layers(moe, chosen, config)
    if "head" not in dense and not config.get("tie_word_embeddings"):
        raise InputError(f"cannot build a {chosen.name} model: {assembly.source} has no head, so it is no language model")
    family, tensors = _table(chosen, converted, dense)
    block = _Block(assembly, moe, chosen, dense)
    outputs = [assembly.output(tensor, block.operation(tensor)) for tensor in tensors]
    assembly.resolver.check_all_used()
    made = portable_config(converted, family=family, dtype=str(assembly.dtype.torch_name))
    if "auto_map" in converted:
        made["auto_map"] = converted["auto_map"]
    warnings = filter(None, (chosen.warning(config), _unaligned(chosen, outputs), unlike_mixtures(assembly.models, moe.router)))
    return Assembled(made, outputs, experts, tuple(warnings))


def _as_ffn(role: str, chosen: MoEFormat) -> str:
    """The role of a dense tensor with the usual name for its feed-forward module."""
    return role.replace(f".{chosen.dense_module}.", ".ffn.", 1)


def _width(chosen: MoEFormat, dense: Mapping[str, ExpectedTensor]) -> int:
    """The width of the feed-forward modules. Raises InputError where it is not the same in all layers."""
    widths = {tensor.shape[1] for role, tensor in dense.items() if role.endswith(".ffn.down")}
    if len(widths) != 1:
        raise InputError(
            f"cannot build a {chosen.name} model: the feed-forward modules are {' and '.join(map(str, sorted(widths)))} wide in "
            "different layers, and experts of this format have one width"
        )
    return widths.pop()


def _joined_parts(tensor: ExpectedTensor, dense: Mapping[str, ExpectedTensor]) -> ExpectedTensor:
    """The tensor, which may hold all experts' of a layer, with the roles of the dense tensors that it is made of."""
    block, ffn, part = tensor.role.rpartition(".ffn.")
    if not ffn or tensor.parts or tensor.expert is not None or len(tensor.shape) != 3:
        return tensor
    halves = [f"{block}.ffn.gate", f"{block}.ffn.up"] if part == "gate_up" and tensor.role not in dense else [tensor.role]
    return replace(tensor, parts=tuple(halves))


def _table(
    chosen: MoEFormat, converted: Mapping[str, Any], dense: Mapping[str, ExpectedTensor]
) -> tuple[Family, list[ExpectedTensor]]:
    """The family of the MoE with this config and its tensors; a format without a table has the one of its config."""
    family = chosen.family if chosen.family.tensors else family_of(converted)
    if family is None:
        raise InputError(f"cannot build a {chosen.name} model: its table comes from transformers: pip install 'moerge[models]'")
    try:
        expected = expected_tensors(family, normalized_config(converted, family))
        return family, [_joined_parts(tensor, dense) for tensor in expected]
    except ValueError as error:
        raise InputError(f"{chosen.name}: config.json: {error}") from None


def _shared(moe: MoE, chosen: MoEFormat, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's keys for the recipe's shared expert, none without one."""
    if moe.shared is None:
        return {}
    if chosen.shared is None:
        raise InputError(f"moe.shared: {chosen.name} has no place for a shared expert: remove 'shared', or choose another format")
    return chosen.shared.keys(config)


def _layers(moe: MoE, chosen: MoEFormat, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's keys for mixtures in the recipe's layers, none for all layers."""
    if moe.layers is None:
        return {}
    try:
        keys = chosen.layers(layers_in(moe.layers, config["num_hidden_layers"]))
    except ValueError as error:
        raise InputError(f"moe.layers: {error}") from None
    if keys is None:
        raise InputError(f"moe.layers: {chosen.name} cannot have experts in the layers {moe.layers} only: remove 'layers'")
    return keys


@dataclass(frozen=True)
class _Block:
    """Makes the operations of a MoE's tensors; `dense` are those of the models, by role."""

    assembly: Assembly
    moe: MoE
    format: MoEFormat
    dense: Mapping[str, ExpectedTensor]

    def operation(self, tensor: ExpectedTensor) -> Operation:
        """The operation that fills a tensor of the MoE."""
        role = tensor.role.split(".", 2)[-1]
        if is_routed(tensor.role) and not _among(self.format.zero_roles, role):
            return router_operation(self.assembly, self.moe.router, tensor)
        if self.moe.shared is not None and role.startswith((_SHARED, _SHARED_GATE)):
            return self._of_shared(tensor)
        if tensor.expert is None and not tensor.parts and tensor.role in self.dense:
            return self.assembly.merged(self.dense[tensor.role], self.assembly.recipe.expert_names)
        if _among(self.format.zero_roles, role):
            return Draw(seed=0, bound=0.0)
        if _among(self.format.random_roles, role):
            return Draw.of_linear(tensor.shape[-1])
        return self._scaled(self._of_experts(tensor), tensor, 1 - self.moe.shared_weight if self._scales else 1)

    @property
    def _scales(self) -> bool:
        """True if the weights of a shared expert and of the others have to be in their tensors."""
        return self.moe.shared is not None and self.format.shared is not None and not self.format.shared.weighs

    def _of_experts(self, tensor: ExpectedTensor) -> Operation:
        """An expert's own tensor, or that of all experts joined where the format stores them as one."""
        experts = self.assembly.recipe.expert_names
        if tensor.parts:
            roles = [tensor.role] if tensor.role in self.dense else tensor.parts
            return self.assembly.joined(tensor, experts, [self.dense[role].name for role in roles])
        assert tensor.expert is not None
        return self.assembly.copied(experts[tensor.expert], self.dense[tensor.dense_role].name)

    def _of_shared(self, tensor: ExpectedTensor) -> Operation:
        """A tensor of the expert that every token goes through; its gate stays half open, as its output's scale assumes."""
        assert self.moe.shared is not None and self.format.shared is not None
        if tensor.role.endswith(_SHARED_GATE):
            return Draw.of_linear(tensor.shape[-1], std=_HALF_OPEN)
        roles = tensor.parts or (tensor.role,)
        names = [self.dense[role.replace(f".{_SHARED}", ".ffn.")].name for role in roles]
        own = self.moe.shared
        copied = self.assembly.joined(tensor, [own], names) if tensor.parts else self.assembly.copied(own, names[0])
        scale = self.moe.shared_weight * (2 if self.format.shared.gated else 1)
        return self._scaled(copied, tensor, scale if self._scales else 1)

    def _scaled(self, copied: Operation, tensor: ExpectedTensor, scale: float) -> Operation:
        """The operation, or where it makes what a module ends with, its result times `scale`."""
        if scale == 1 or not _OUTPUT.search(tensor.parts[0] if tensor.parts else tensor.role):
            return copied
        assert isinstance(copied, Copy)
        return Merge(Linear(normalize=False), (copied.source,), (scale,))


def _unaligned(chosen: MoEFormat, outputs: Sequence[Output]) -> str | None:
    """A warning about experts that transformers 5 does not run as it is set up; our own code looks for itself."""
    if chosen.name == FORMAT:
        return None
    kept = [output for output in outputs if MODULE.search(output.role) and len(output.shape) > 1]
    odd = {size for output in kept for size in output.shape[-2:] if size * output.dtype.itemsize % GROUPED_BYTES}
    if not odd:
        return None
    return (
        f"transformers 5 multiplies experts by a product that takes rows of multiples of {GROUPED_BYTES} bytes, and theirs have "
        f"{min(odd)} elements: load the result with experts_implementation='eager'"
    )


def _among(beginnings: Sequence[str], role: str) -> bool:
    return any(role == beginning or role.startswith(f"{beginning}.") for beginning in beginnings)
