"""The merged model while it learns: the base in memory, weight matrices merged layer by layer as the layers run.

Layers run under activation checkpointing. A layer's merged weights exist while it runs forward and again while it is
recomputed in the backward pass; each weight's gradient is turned into K inner products and dropped. So memory is the base, one
layer's activations and weights, and one tensor of every expert, whatever the number of experts.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from moerge.errors import InputError
from moerge.learning.directions import Directions, inner_products, merged
from moerge.runtime.inputs import Inputs, on_device
from moerge.runtime.loading import explained, load_config
from moerge.tensors.source import Source
from moerge.tensors.streams import read_values

_ADVICE = "check it, or upgrade transformers"
BASE = -1
"""The base's number among the experts."""


@dataclass(frozen=True)
class MergedParameter:
    """A tensor of the model, by its name in the checkpoint: the base's, and the experts' `directions`.

    Without `directions` there is nothing to merge: the result has the base's tensor. `key` names the coefficients that it
    learns; "" for a tensor that does not learn. `routed` marks what stays separate in a MoE: each text runs through its own
    expert's tensor.
    """

    name: str
    base: Source
    directions: Directions | None = None
    key: str = ""
    routed: bool = False

    def of(self, model: int) -> Source:
        """The tensor of the base or of an expert."""
        return self.base if model == BASE or self.directions is None else self.directions.merge.experts[model]


@dataclass
class Running:
    """The model that runs: one of the models as it is (`model`), or the merge, on a text of expert `task`."""

    model: int | None = None
    task: int = BASE


class MergedWeight(nn.Module):
    """A parametrization: the weight that a layer sees instead of the base's."""

    def __init__(self, slot: MergedParameter, logit_EC: torch.Tensor | None, running: Running, dtype: torch.dtype) -> None:
        super().__init__()
        self._slot, self._logit_EC, self._running, self._dtype = slot, [logit_EC], running, dtype

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """The weight in the element type that the model computes in."""
        wanted = self._running.task if self._slot.routed and self._running.model is None else self._running.model
        if wanted is not None:
            return _values(self._slot.of(wanted), base, self._dtype)
        logit_EC, directions = self._logit_EC[0], self._slot.directions
        assert logit_EC is not None and directions is not None
        merge: Any = _Merge.apply
        weight: torch.Tensor = merge(torch.sigmoid(logit_EC), base, directions, self._dtype)
        return weight


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, c_EC: torch.Tensor, base: torch.Tensor, directions: Directions, dtype: torch.dtype) -> torch.Tensor:
        ctx.directions, ctx.chunks, ctx.like = directions, c_EC.shape[1], c_EC
        return merged(base, directions, c_EC.detach(), dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return inner_products(gradient, ctx.directions, ctx.chunks).to(ctx.like), None, None, None


class MergingModel:
    """A causal language model of this config whose weights are merged from `slots`.

    `coef_logits` holds the parameters a [E, C] by key; the coefficients are sigmoid(a). Tensors without a key always have the
    coefficient `fixed`. Raises InputError, naming the recipe `source`, for a config that transformers can make no model
    of, and where it calls tensors by names that cannot be matched.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        slots: Sequence[MergedParameter],
        coef_logits: Mapping[str, torch.Tensor],
        fixed: float,
        *,
        dtype: str,
        device: str,
        source: str = "recipe",
    ) -> None:
        self.running, self._dtype, self._fixed = Running(), getattr(torch, dtype), fixed
        self.module = _skeleton(config, device, source)
        self._rest: list[tuple[nn.Parameter, MergedParameter]] = []
        parameters = dict(self.module.named_parameters())
        for name, slot in match_names(parameters, {slot.name: slot for slot in slots}).items():
            parameters[name].requires_grad_(False)
            if slot.key or slot.routed:
                self._parametrize(parameters[name], slot, coef_logits.get(slot.key))
            else:
                self._rest.append((parameters[name], slot))
        self._prepare()
        self.set_mode(None)

    def set_mode(self, model: int | None) -> None:
        """Run one of the models, or the merge if `model` is None."""
        self.running.model = model
        for parameter, slot in self._rest:
            if model is None and slot.directions is not None:
                c_E1 = torch.full((len(slot.directions.merge.experts), 1), self._fixed, device=parameter.device)
                parameter.data = merged(_values(slot.base, parameter, torch.float32), slot.directions, c_E1, self._dtype)
            else:
                parameter.data = _values(slot.of(BASE if model is None else model), parameter, self._dtype)

    def forward(self, inputs: Inputs, task: int) -> Any:
        """transformers' output, with hidden states, for a document of this task."""
        self.running.task = task
        return self.module(**on_device(inputs, self.module.device, self._dtype), use_cache=False, output_hidden_states=True)

    def _parametrize(self, parameter: nn.Parameter, slot: MergedParameter, logit_EC: torch.Tensor | None) -> None:
        """Wherever the parameter stands: a tied one is the embedding's and the head's."""
        stored = slot.base.tensor.dtype.torch_name
        parameter.data = _values(slot.base, parameter, getattr(torch, str(stored)))
        weight = MergedWeight(slot, logit_EC, self.running, self._dtype)
        for module in list(self.module.modules()):
            for attribute in [name for name, value in module.named_parameters(recurse=False) if value is parameter]:
                parametrize.register_parametrization(module, attribute, weight, unsafe=True)

    def _prepare(self) -> None:
        """Activation checkpointing, which transformers does only in training mode; nothing is dropped out for it."""
        self.module.train()
        for module in self.module.modules():
            for name in ("p", "attention_dropout", "dropout", "resid_dropout", "hidden_dropout"):
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.0)
        enable = getattr(self.module, "activation_checkpointing_enable", None) or self.module.gradient_checkpointing_enable
        enable({"use_reentrant": False})


def known_config(config: Mapping[str, Any], source: str) -> Any:
    """A config.json as transformers knows it. Raises InputError, naming the recipe `source`, where it cannot read it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return load_config(folder, name="the models' config.json", what="read", advice=_ADVICE, where=source)


def _skeleton(config: Mapping[str, Any], device: str, source: str) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    known = known_config(config, source)
    architecture = (config.get("architectures") or [""])[0]
    kind = getattr(transformers, str(architecture), None)
    if kind is None:
        raise InputError(
            f"{source}: transformers {version('transformers')} has no {architecture!r}, so its coefficients cannot be learned"
        )
    dtype = getattr(torch, str(config.get("dtype", "float32")))
    with no_init_weights(), explained("the models' config.json", "make a model of", _ADVICE, source):
        model = kind._from_config(known, dtype=dtype)
    model.to(device)
    model.tie_weights()  # which is left out together with the drawing of weights
    return model


def _values(source: Source, like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(read_values(source)).to(like.device, dtype).view(source.tensor.shape)


def match_names(parameters: Mapping[str, torch.Tensor], slots: Mapping[str, MergedParameter]) -> dict[str, MergedParameter]:
    """The slot of each parameter: the tensor with the longest common ending, since transformers renames beginnings.

    Raises InputError where none has the parameter's shape, or two fit equally well.
    """
    endings: dict[str, list[str]] = {}
    for name in slots:
        endings.setdefault(_last(name), []).append(name)
    found = {}
    for name, parameter in parameters.items():
        near = [other for other in endings.get(_last(name), ()) if slots[other].base.tensor.shape == parameter.shape]
        scores = sorted(((_common(name, other), other) for other in near), reverse=True)
        if not scores or (len(scores) > 1 and scores[0][0] == scores[1][0]):
            raise InputError(f"transformers has a parameter {name!r} that is not among the checkpoint's tensors: cannot learn")
        found[name] = slots[scores[0][1]]
    return found


def _last(name: str) -> str:
    """The ending that two names must share: the last two parts, with the layer's number."""
    number = re.search(r"\.\d+\..*", name)
    return number[0] if number else ".".join(name.split(".")[-2:])


def _common(one: str, other: str) -> int:
    count = 0
    for a, b in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if a != b:
            break
        count += 1
    return count
