"""Running a merged MoE over calibration text with its routing forced, to see what its routers see.

Shapes: L layers, E experts, T tokens, H hidden, V vocabulary. torch is imported only here, and only when a model runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moerge.errors import InputError
from moerge.extras import require
from moerge.runtime.loading import Loaded, load_model, load_tokenizer, usable_device
from moerge.texts import Document, encode

if TYPE_CHECKING:
    import torch

Route = int | None
"""Which expert takes every token; None mixes all in equal parts."""


class ForcedRoutingModel:
    """A token-routed MoE in memory, whose router outputs are replaced, so that its gates' values do not matter."""

    def __init__(
        self,
        folder: Path,
        *,
        experts: int,
        layers: int | None = None,
        device: str = "cpu",
        dtype: str | None = None,
        model: Any = None,
    ) -> None:
        """`model` is an already loaded model to use as it is; `layers` is the number of layers that must have gates."""
        require("models", "a calibrated router")
        self.experts = experts
        self._folder = folder
        self._tokenizer: Any = None
        self._device = usable_device(device, "moe.router.device") if model is None else model.device
        self._model = load_model(folder, dtype=dtype) if model is None else model
        self._model.to(self._device).eval()
        self._gates = find_gates(self._model, experts)
        self._routers = _routers(self._model, self._gates)
        self._blocks = [module for module in self._model.modules() if _chooses(module, self._gates)]
        if not self._gates:
            raise InputError(f"{folder}: moerge finds no gates in a model of type {self._model.config.model_type}")
        if len(self._gates) != (layers or len(self._gates)):
            raise InputError(
                f"a calibrated router needs a gate in each of {layers} layers, and transformers finds {len(self._gates)}"
            )

    def encode(self, document: Document, tokens: int) -> torch.Tensor:
        """The first `tokens` tokens of a text or conversation, [1, T], as `moerge.texts.encode` makes them."""
        import torch

        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._folder)
        ids = encode(self._tokenizer, document, tokens)
        Loaded(str(self._folder), self._model, self._tokenizer).check_ids(ids)
        return torch.tensor([ids], dtype=torch.long, device=self._device)

    def random_tokens(self, seed: int, tokens: int) -> torch.Tensor:
        """Tokens drawn uniformly from the vocabulary, [1, T]: input that is not text."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self._model.config.vocab_size, (1, tokens), generator=generator).to(self._device)

    @property
    def on_cpu(self) -> bool:
        """Return whether the model runs on the CPU."""
        return bool(self._device.type == "cpu")

    def replica(self) -> ForcedRoutingModel:
        """Return a model that shares the weights but has its own modules, so that it can run in another thread."""
        shared = (*self._model.parameters(), *self._model.buffers(), self._tokenizer)
        return copy.deepcopy(self, {id(part): part for part in shared})

    def router_logits(self, ids_1T: torch.Tensor, **beside: torch.Tensor) -> list[torch.Tensor]:
        """Return each layer's own router outputs, L times [T, E] in float32, given what the model takes `beside` tokens."""
        import torch

        with torch.no_grad(), self._record_router_inputs() as inputs_LTH:
            self._model.base_model(input_ids=ids_1T, use_cache=False, **beside)
            return [state_TH @ gate.weight.float().T for state_TH, gate in zip(inputs_LTH, self._gates, strict=True)]

    def router_inputs(self, ids_1T: torch.Tensor, path: Route) -> list[torch.Tensor]:
        """Return the inputs of each layer's router on this path, L times [T, H] in float32."""
        import torch

        with torch.no_grad(), self._force_routing(path), self._record_router_inputs() as inputs_LTH:
            self._model.base_model(input_ids=ids_1T, use_cache=False)
        return inputs_LTH

    def losses(self, ids_1T: torch.Tensor, path: Route, **beside: torch.Tensor) -> torch.Tensor:
        """-log P of each token but the first given those before it, [T - 1], in nats; `beside` as in `router_logits`."""
        import torch

        with torch.no_grad(), self._force_routing(path):
            logits_TV = self._model(input_ids=ids_1T, use_cache=False, **beside).logits[0].float()
        return torch.nn.functional.cross_entropy(logits_TV[:-1], ids_1T[0, 1:], reduction="none")

    @contextmanager
    def _record_router_inputs(self) -> Iterator[list[torch.Tensor]]:
        inputs_LTH: list[torch.Tensor] = []

        def record(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            state = arguments[0].detach()
            inputs_LTH.append(state.reshape(-1, state.shape[-1]).float())

        handles = [gate.register_forward_pre_hook(record) for gate in self._gates]
        try:
            yield inputs_LTH
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _force_routing(self, path: Route) -> Iterator[None]:
        handles = [
            router.register_forward_hook(partial(_override_router_output, path=path, experts=self.experts))
            for router in self._routers
        ]
        chosen = {block: block.top_k for block in self._blocks}
        try:
            for block in self._blocks:
                block.top_k = self.experts  # transformers 4 chooses here
            yield
        finally:
            for handle in handles:
                handle.remove()
            for block, top_k in chosen.items():
                block.top_k = top_k


_INSIDE = (".gate.wg", ".router.proj")
"""What a gate's matrix is called inside of the module that chooses: HunYuan, Gemma 4."""
_GATES = (".gate", ".router", ".router.layer", *_INSIDE)
"""How the module that holds a gate's matrix is called: Mixtral and most others, GraniteMoe in transformers 5, and in 4."""


def find_gates(model: Any, experts: int) -> list[Any]:
    """The modules of a model, layer by layer, whose `weight` is a gate [E, H] and whose input is what the router sees."""
    named = [module for name, module in model.named_modules() if name.endswith(_GATES)]
    return [module for module in named if hasattr(module, "weight") and len(module.weight) == experts]


def _routers(model: Any, gates: list[Any]) -> list[Any]:
    """The modules that choose experts by what gates say: the gates themselves, or those that hold them."""
    names = {id(module): name for name, module in model.named_modules()}
    found = []
    for gate in gates:
        name = names[id(gate)]
        found.append(model.get_submodule(name.rpartition(".")[0]) if name.endswith(_INSIDE) else gate)
    return found


def _chooses(module: Any, gates: list[Any]) -> bool:
    """Return whether a module takes the top K of what a gate within it says, as it is in transformers 4."""
    held = (getattr(module, "gate", None), getattr(module, "layer", None))
    return hasattr(module, "top_k") and any(gate is one for gate in gates for one in held)


def _override_router_output(module: Any, arguments: Any, output: Any, *, path: Route, experts: int) -> Any:
    """The router's output as it would be if it chose `path` for each token."""
    import torch

    if isinstance(output, torch.Tensor):  # transformers 4: logits, whose softmax the block takes
        if path is None:
            return torch.zeros_like(output)
        forced = torch.full_like(output, -torch.inf)
        forced[..., path] = 0
        return forced
    logits_TE, weights_TK, chosen_TK = output
    if path is None:
        every_E = torch.arange(experts, dtype=chosen_TK.dtype, device=chosen_TK.device)
        chosen = every_E.repeat(len(chosen_TK), 1)
    else:
        chosen = torch.full_like(chosen_TK[:, :1], path)
    weights = torch.full(chosen.shape, 1 / chosen.shape[1], dtype=weights_TK.dtype, device=weights_TK.device)
    return logits_TE, weights, chosen
