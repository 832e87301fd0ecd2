"""Task-vector routing (the paper's appendix C): which expert's training would have lowered the base's loss on this prompt.

score_i = cos(-g, tau_i) with tau_i = theta_i - theta_base and g the gradient of the base's loss on the prompt. Training moves
along -g, so the task vector of an expert that was trained on such text points along -g. The paper writes Sim(g, tau) with
tau = theta_base - theta_i, which is the same number. The base's own task vector is zero and has no direction: its score is
defined as 0, above experts that moved the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters_moerge import plain_name
from .lowrank_moerge import AdaptedLinear
from .naming_moerge import dense_name, layer_of, role_of
from .routing_moerge import Prompt

Products = Callable[[Tensor], Iterator[tuple[int, Tensor, Tensor]]]
"""From the gradient of a tensor to (expert, <tau, gradient>, <tau, tau>) of each of its task vectors."""

BASED_ON = "cos(-gradient of the base's loss on the prompt, task vector of each expert)"


def cosines(model: Any, prompt: Prompt) -> Tensor:
    """Score of every expert for every sequence, one backward pass each. Extra memory: one expert's gradient."""
    base = model.config.expert_names.index("base")
    chosen, adapted = tensors(model), adapted_layers(model)
    if model.config.adapters is None:
        parameters, vectors = [group[base] for group in chosen.values()], [_differences(g, base) for g in chosen.values()]
    else:
        parameters, vectors = [group[0] for group in chosen.values()], [adapted.get(name, _nothing) for name in chosen]
    rows = []
    with torch.inference_mode(False), torch.enable_grad(), _with_gradients(parameters):
        for index in range(len(prompt.ids_BT)):
            nll = model.path_nll(base, prompt.row(index))[0][0]
            gradients = torch.autograd.grad(nll, parameters) if nll.requires_grad else None
            rows.append(_cosines(vectors, gradients, model.config.num_experts).to(prompt.ids_BT.device))
    return torch.stack(rows)


def tensors(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The separate parameters that take part, by dense name, one per expert.

    What PEFT adds to the model is part of no task vector; it calls the parameters that it wraps `base_layer`.
    """
    config: Any = model.config
    own: Any = model.own_parameters
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        name = name.replace(".base_layer.", ".")
        if name.startswith("router.") or name not in own or plain_name(name):
            continue
        dense, _ = dense_name(name)
        if _takes_part(dense, config):
            found.setdefault(dense, []).append(parameter)
    return found


def adapted_layers(model: nn.Module) -> dict[str, Products]:
    """The products of the layers with adapters, by the dense name of their weight."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))
    return {dense_name(f"{name.removesuffix('.base_layer')}.weight")[0]: layer.products for name, layer in layers}


def _takes_part(dense: str, config: Any) -> bool:
    roles, layers, layer = config.routing["roles"] or config.separate, config.routing["layers"], layer_of(dense)
    return role_of(dense) in roles and (layers is None or layer is None or layer in layers)


def _nothing(gradient: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Return the share of a tensor that no expert changes."""
    return iter(())


def _differences(group: list[nn.Parameter], base: int) -> Products:
    """<tau_i, g> and <tau_i, tau_i> of a tensor, with one task vector in memory at a time."""

    def products(gradient: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        g = gradient.float().flatten()
        for expert, parameter in enumerate(group):
            if expert != base:
                tau = (parameter.float() - group[base].to(parameter.device).float()).flatten()
                yield expert, tau.dot(g.to(tau.device)), tau.dot(tau)

    return products


def _cosines(vectors: list[Products], gradients: tuple[Tensor, ...] | None, experts: int) -> Tensor:
    """cos(-g, tau_i); 0 where an expert has no task vector."""
    if gradients is None:
        return torch.zeros(experts)
    dot_E, square_E, square_g = torch.zeros(experts), torch.zeros(experts), torch.zeros(())
    with torch.no_grad():
        for products, gradient in zip(vectors, gradients, strict=True):
            g = gradient.float().flatten()
            square_g += g.dot(g).cpu()
            for expert, dot, square in products(gradient):
                dot_E[expert] -= dot.cpu()
                square_E[expert] += square.cpu()
    norms_E = (square_E * square_g).sqrt()
    return torch.where(norms_E > 0, dot_E / norms_E.clamp_min(torch.finfo(torch.float32).tiny), 0.0)


@contextmanager
def _with_gradients(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Frozen parameters take part too; their state and `grad` stay what they were."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
