"""A native mixture that runs one layer at a time, its tensors read from disk as they are needed.

transformers' own code computes everything but the experts: attention, masks, norms, routers, shared experts. Its decoder layers
are made without values, and get them while they run. Experts are computed here, from the router's choice and gates as the
family's block hands them over, so that what each of them puts out can be seen. Shapes: T tokens, K chosen experts, E experts,
D width, F neurons.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moerge.architecture.family import Family, expected_tensors
from moerge.architecture.mixture import is_routed
from moerge.errors import InputError
from moerge.extras import require
from moerge.quiet import without_warnings
from moerge.runtime.loading import explained, usable_device
from moerge.tensors.codec import decode
from moerge.tensors.dtypes import BF16, F32
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.span import SpanTensor

if TYPE_CHECKING:
    import torch

PARTS = ("gate", "up", "down")
"""An expert's matrices, as roles call them."""
_NO_LAYERS = "transformers {version} has no separate experts module in models of type {kind!r}: upgrade it to 5.5 or newer"


class Dispatch(NamedTuple):
    """Tokens at a layer's experts: their router inputs, the experts that each goes to, its gates and their outputs.

    Gates are as the model multiplies by them: normalized over the chosen experts in families that do so.
    """

    inputs_TD: torch.Tensor
    chosen_TK: torch.Tensor
    gates_TK: torch.Tensor
    outputs_TKD: torch.Tensor


Visit = Callable[[Dispatch], None]
ExpertTensors = Mapping[str, Tensor]
"""The tensors of an expert by the names in `PARTS`."""


class _Finished(Exception):
    """Carries what was asked for: a layer's output, or its router's inputs."""


@dataclass(frozen=True)
class MixtureTensors:
    """A mixture's tensors by name, as its family's table has them, and its normalized config."""

    family: Family
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @cached_property
    def experts(self) -> Mapping[int, Sequence[ExpertTensors]]:
        """The experts' tensors by layer and number; only layers with experts are there."""
        layers: dict[int, list[dict[str, Tensor]]] = {}
        count = self.config["num_local_experts"]
        for expected in expected_tensors(self.family, self.config):
            if expected.expert is None and not expected.parts:
                continue
            layer = int(expected.role.split(".")[1])
            experts = layers.setdefault(layer, [{} for _ in range(count)])
            if expected.expert is not None:
                experts[expected.expert][expected.role.rpartition(".")[2]] = self.tensors[expected.name]
            else:
                for part, number, tensor in self._of_all(expected.name, expected.shape, expected.parts):
                    experts[number][part] = tensor
        return layers

    def _of_all(self, name: str, shape: tuple[int, ...], parts: Sequence[str]) -> Iterator[tuple[str, int, Tensor]]:
        """The parts of each expert in a tensor of all, one after the other."""
        rows, size = shape[1] // len(parts), prod(shape[1:])
        for number in range(shape[0]):
            for place, role in enumerate(parts):
                part_shape = (rows, *shape[2:])
                start = number * size + place * prod(part_shape)
                yield role.rpartition(".")[2], number, SpanTensor(name, part_shape, self.tensors[name], start)

    @cached_property
    def routers(self) -> Mapping[int, Tensor]:
        """The routers' matrices [E, D] by layer."""
        found = (tensor for tensor in expected_tensors(self.family, self.config) if is_routed(tensor.role))
        return {int(tensor.role.split(".")[1]): self.tensors[tensor.name] for tensor in found if len(tensor.shape) == 2}


class LayerwiseModel:
    """The decoder layers of a mixture, each of which can be brought into memory. Threads may run different texts at once."""

    def __init__(
        self, written: Mapping[str, Any], mixture: MixtureTensors, *, name: str, dtype: str | None = None, device: str = "cpu"
    ) -> None:
        """`written` is the config.json, `dtype` what to compute in: by default as stored, in float32 for float16."""
        require("models", "running a mixture layer by layer")
        import torch
        import transformers

        self.name, self.mixture, self._running = name, mixture, threading.local()
        self.device = usable_device(device, f"{name}: device")
        self.dtype = getattr(torch, dtype) if dtype else self._stored_dtype()
        settings = {key: value for key, value in written.items() if key not in ("auto_map", "torch_dtype", "dtype")}
        with explained(name), without_warnings(), torch.device("meta"):
            config = transformers.AutoConfig.for_model(**settings)
            auto: Any = transformers.AutoModelForCausalLM
            model = auto.from_config(config, dtype=self.dtype)
        self.body = model.base_model.eval()
        self.body.rotary_emb = type(self.body.rotary_emb)(config=config).to(self.device)
        for number, layer in enumerate(self.body.layers):
            layer.forward = partial(self._forward, number, layer.forward)
        self._embedding = self._tensor("embedding")

    def _stored_dtype(self) -> Any:
        import torch

        first = next(iter(self.mixture.routers.values())).dtype
        return torch.bfloat16 if first is BF16 else torch.float32

    def _tensor(self, role: str) -> Tensor:
        name = self.mixture.family.name_of(role)
        assert name is not None
        return self.mixture.tensors[name]

    @property
    def vocabulary(self) -> int:
        """The rows of its embedding."""
        return self._embedding.shape[0]

    @property
    def width(self) -> int:
        """The width of its states."""
        return self._embedding.shape[1]

    @property
    def layers(self) -> int:
        """The number of its layers."""
        return len(self.body.layers)

    def values(self, tensor: Tensor) -> torch.Tensor:
        """A tensor in memory, in the type that is computed in."""
        import torch

        stored_N = tensor.open().read(0, np.empty(tensor.size, tensor.dtype.storage))
        if tensor.dtype is BF16 and self.dtype is torch.bfloat16:
            return torch.from_numpy(stored_N.view(np.int16)).view(torch.bfloat16).reshape(tensor.shape).to(self.device)
        values_N = np.empty(tensor.size, np.float32)
        if tensor.dtype is F32:
            values_N = stored_N.view(np.float32)
        else:
            decode(stored_N, tensor.dtype, values_N)
        return torch.from_numpy(values_N).reshape(tensor.shape).to(self.device, self.dtype)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """The embedding's rows of some tokens, [T, D]; only they are read."""
        width = self._embedding.shape[1]
        rows = {row: SpanTensor("row", (width,), self._embedding, row * width) for row in dict.fromkeys(ids)}
        import torch

        read = {row: self.values(tensor) for row, tensor in rows.items()}
        return torch.stack([read[row] for row in ids])

    @contextmanager
    def layer(
        self, number: int, *, router_ED: np.ndarray | None = None, experts: Sequence[Mapping[str, Any]] | None = None
    ) -> Iterator[Layer]:
        """Bring a layer into memory, with another router and other experts if they are given.

        Raises InputError where a tensor of it is missing.
        """
        module, routed = self.body.layers[number], number in self.mixture.routers
        block = self._block(module) if routed else None
        router = self._router(module) if routed else None
        self._fill(number, module, block, {} if router is None else {id(router): self._rows(number, router_ED)})
        loaded = experts or (self.mixture.experts[number] if routed else ())
        layer = Layer(self, number, router, [self._expert(expert) for expert in loaded])
        own = None if block is None else block.experts
        if block is not None:
            block.experts = layer.module(block.experts.act_fn)
        try:
            yield layer
        finally:
            if block is not None:
                block.experts = own
            module.to("meta")
            layer.experts = ()  # whoever still holds the layer would hold them while the next one is read

    def _block(self, module: Any) -> Any:
        """The module that has a router and experts; InputError if transformers is too old to have them apart."""
        found = next((child for child in module.modules() if hasattr(getattr(child, "experts", None), "act_fn")), None)
        if found is None:
            import transformers

            kind = self.mixture.family.model_type
            raise InputError(f"{self.name}: {_NO_LAYERS.format(version=transformers.__version__, kind=kind)}")
        return found

    def _router(self, module: Any) -> Any:
        """The module that holds the router's matrix."""
        shape = self.mixture.config["num_local_experts"], self.width
        named = [child for name, child in module.named_modules() if name.endswith((".gate", ".router"))]
        return next(child for child in named if hasattr(child, "weight") and tuple(child.weight.shape) == shape)

    def _rows(self, number: int, router_ED: np.ndarray | None) -> torch.Tensor:
        return self.values(self.mixture.routers[number]) if router_ED is None else self._given(router_ED)

    def _fill(self, number: int, module: Any, block: Any, routers: Mapping[int, torch.Tensor]) -> None:
        """Give a layer's parameters values, but for those of its experts."""
        experts = set() if block is None else set(block.experts.modules())
        for path, owner in module.named_modules():
            for name, _ in list(owner.named_parameters(recurse=False)) if owner not in experts else ():
                values = routers[id(owner)] if id(owner) in routers else self._stored(f"model.layers.{number}.{path}.{name}")
                setattr(owner, name, _fixed(values))

    def _stored(self, name: str) -> torch.Tensor:
        if name not in self.mixture.tensors:
            raise InputError(f"{self.name} lacks tensor {name!r}: fetch or copy the checkpoint again")
        return self.values(self.mixture.tensors[name])

    def _given(self, values: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(values, np.float32)).to(self.device, self.dtype)

    def _expert(self, expert: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        return {
            part: self._given(values) if isinstance(values, np.ndarray) else self.values(values)
            for part, values in expert.items()
        }

    def _forward(self, number: int, own: Callable[..., Any], state: Any, *arguments: Any, **options: Any) -> Any:
        """In place of a layer's own: pass the state on, but run the layer that is asked for, and nothing after it."""
        if number != self._running.number:
            return state
        given = self._running.state_1TD
        found = own(state if given is None else given, *arguments, **options)
        raise _Finished((found[0] if isinstance(found, tuple) else found)[0])


class Layer:
    """A layer in memory. `router` is None where it has no experts; `experts` are their matrices by number."""

    def __init__(self, model: LayerwiseModel, number: int, router: Any, experts: Sequence[Mapping[str, torch.Tensor]]) -> None:
        self.model, self.number, self.router, self.experts = model, number, router, experts
        self._activation: Any = None

    def run(self, state_TD: torch.Tensor, visit: Visit | None = None) -> torch.Tensor:
        """The layer's output for a text's states [T, D], for layer 0 its embeddings; `visit` sees the experts at work."""
        return self._until_finished(state_TD, visit)

    def inputs(self, state_TD: torch.Tensor) -> torch.Tensor:
        """The router's inputs for a text's states, [T, D]; no expert runs."""
        return self._until_finished(state_TD, _stop)

    def _until_finished(self, state_TD: torch.Tensor, visit: Visit | None) -> torch.Tensor:
        import torch

        running = self.model._running
        running.number, running.visit = self.number, visit
        running.state_1TD = None if self.number == 0 else state_TD[None]
        try:
            with torch.no_grad():
                self.model.body(inputs_embeds=state_TD[None], use_cache=False)
        except _Finished as finished:
            return torch.as_tensor(finished.args[0])
        raise AssertionError("the layer did not run")

    def logits(self, inputs_TD: torch.Tensor) -> torch.Tensor:
        """The router's logits, float32 [T, E]."""
        logits_TE: torch.Tensor = inputs_TD.float() @ self.router.weight.float().T
        return logits_TE

    def activations(self, expert: int, inputs_TD: torch.Tensor) -> torch.Tensor:
        """The inputs of an expert's down projection, [T, F]."""
        return self.neurons(self.experts[expert], inputs_TD)

    def neurons(self, matrices: Mapping[str, torch.Tensor], inputs_TD: torch.Tensor) -> torch.Tensor:
        """act(gate @ x) * (up @ x) for any expert's matrices, [T, F]."""
        gate_TF, up_TF = inputs_TD @ matrices["gate"].T, inputs_TD @ matrices["up"].T
        activated_TF: torch.Tensor = self._activation(gate_TF) * up_TF
        return activated_TF

    def output(self, expert: int, inputs_TD: torch.Tensor) -> torch.Tensor:
        """An expert's output, [T, D]."""
        return self.activations(expert, inputs_TD) @ self.experts[expert]["down"].T

    def module(self, activation: Any) -> Any:
        """In place of transformers' module of all experts."""
        from torch import nn

        self._activation, compute = activation, self._compute

        class Experts(nn.Module):
            def forward(self, inputs_TD: Any, chosen_TK: Any, gates_TK: Any) -> Any:
                return compute(inputs_TD, chosen_TK, gates_TK)

        return Experts()

    def _compute(self, inputs_TD: torch.Tensor, chosen_TK: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
        import torch

        visit = self.model._running.visit
        outputs_TKD = torch.zeros(*chosen_TK.shape, inputs_TD.shape[-1], dtype=inputs_TD.dtype, device=inputs_TD.device)
        if visit is not _stop:
            for expert in torch.unique(chosen_TK).tolist():
                tokens, places = torch.where(chosen_TK == expert)
                outputs_TKD[tokens, places] = self.output(expert, inputs_TD[tokens])
        if visit is not None:
            visit(Dispatch(inputs_TD, chosen_TK, gates_TK, outputs_TKD))
        mixed_TD = (outputs_TKD * gates_TK[..., None].to(outputs_TKD.dtype)).sum(dim=1)
        return mixed_TD.to(inputs_TD.dtype)


def _stop(dispatch: Dispatch) -> None:
    """Break a layer off where its experts begin."""
    raise _Finished(dispatch.inputs_TD)


def _fixed(values: torch.Tensor) -> Any:
    from torch import nn

    return nn.Parameter(values, requires_grad=False)
