"""A MoE on one document: the experts' weights, and each expert's loss when it is alone.

Shapes: E experts, L layers, T tokens, N layers times tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moerge.errors import InputError
from moerge.runtime.forced_routing import ForcedRoutingModel
from moerge.runtime.inputs import Inputs, text_tokens
from moerge.runtime.loading import Loaded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DocumentRouting:
    """A document's weights, how often each expert is first, and the weights' entropy in nats, averaged over layers and tokens.

    `alpha_LE` are the weights layer by layer in token-routed models; `loss_E` is each expert's loss in nats a token, empty where
    it was not asked for and for documents of a single token, which have none.
    """

    alpha_E: Sequence[float]
    first_E: Sequence[float]
    entropy: float
    alpha_LE: Sequence[Sequence[float]] = ()
    loss_E: Sequence[float] = ()


class RouterProbe(Protocol):
    """A loaded MoE, by the level at which it routes."""

    level: str
    experts: tuple[str, ...]

    def route(self, inputs: Inputs, oracle: bool) -> DocumentRouting:
        """A document, with the losses of the experts alone if `oracle`."""
        ...


def router_probe(loaded: Loaded) -> RouterProbe:
    """The MoE of a checkpoint; InputError if it is none."""
    return BySequence(loaded) if loaded.by_sequence else ByToken(loaded)


class BySequence:
    """A sequence-routed model. An expert alone is its path, what fixed routing to it runs."""

    level = "sequence"

    def __init__(self, loaded: Loaded) -> None:
        self._model = loaded.model
        self.experts = tuple(loaded.model.config.expert_names)

    def route(self, inputs: Inputs, oracle: bool) -> DocumentRouting:
        """From `model.route`."""
        ids_1T = inputs["input_ids"]
        routing = self._model.route(ids_1T)
        alpha_E = routing.alpha[0].tolist()
        best = max(range(len(alpha_E)), key=alpha_E.__getitem__)
        entropy = sum(-alpha * math.log(alpha) for alpha in alpha_E if 0 < alpha < 1)
        losses = self._losses(ids_1T, routing) if oracle and ids_1T.shape[1] > 1 else ()
        return DocumentRouting(alpha_E, [float(expert == best) for expert in range(len(alpha_E))], entropy, loss_E=losses)

    def _losses(self, ids_1T: torch.Tensor, routing: object) -> list[float]:
        import torch

        options = self._model.config.routing
        reads_all = options.get("on") != "prefix" or ids_1T.shape[1] <= options["prefix_tokens"]
        if options["kind"] == "perplexity" and reads_all:  # its scores are 1 / PPL
            return [-score.log().item() for score in routing.scores[0]]  # type: ignore[attr-defined]
        with torch.no_grad():
            prompt = self._model.model.make_prompt(ids_1T)
            return [self._model.path_nll(expert, prompt)[0].item() for expert in range(len(self.experts))]


class ByToken:
    """A token-routed model. An expert alone gets every token in every layer."""

    level = "token"

    def __init__(self, loaded: Loaded) -> None:
        self.experts = _experts(loaded)
        self._tokenizer = loaded.tokenizer
        self._moe = ForcedRoutingModel(Path(loaded.name), experts=len(self.experts), model=loaded.model)

    def route(self, inputs: Inputs, oracle: bool) -> DocumentRouting:
        """From the softmax over all experts of every layer's gate; the losses of text alone."""
        import torch

        ids_1T, beside = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
        log_LTE = torch.stack(self._moe.router_logits(ids_1T, **beside)).log_softmax(-1)
        alpha_LE = log_LTE.exp().mean(1)
        first_E = torch.nn.functional.one_hot(log_LTE.argmax(-1), len(self.experts)).float().mean((0, 1))
        entropy = float(-(log_LTE.exp() * log_LTE).sum(-1).mean())
        wanted = range(len(self.experts)) if oracle and ids_1T.shape[1] > 1 else ()
        text_T = torch.tensor(text_tokens(self._tokenizer, ids_1T[0].tolist())[1:], device=ids_1T.device)
        losses = [self._moe.losses(ids_1T, expert, **beside)[text_T].mean().item() for expert in wanted]
        return DocumentRouting(alpha_LE.mean(0).tolist(), first_E.tolist(), entropy, alpha_LE.tolist(), losses)


def _experts(loaded: Loaded) -> tuple[str, ...]:
    """Names of the experts; their numbers where nobody wrote the names down."""
    configs = (loaded.model.config, loaded.model.config.get_text_config())
    counts = (getattr(config, key, None) for config in configs for key in ("num_local_experts", "num_experts"))
    count = next(filter(None, counts), None)
    if not count:
        raise InputError(f"{loaded.name} is a {configs[1].model_type} model without experts: only a MoE routes")
    named = tuple(loaded.manifest["experts"]) if loaded.manifest else ()
    return named if len(named) == count else tuple(map(str, range(count)))
