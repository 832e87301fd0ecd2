"""LoRA adapters that are trained instead of weights, put on by peft: on linear layers, and on experts that lie in one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from moerge.extras import require
from moerge.tuning.models import local, part_of
from moerge.tuning.parts import Parts, Schedule, select_parameters, split_slice
from moerge.tuning.settings import Adapters, TuneConfig

TRAINED = "trained.safetensors"
"""In a training checkpoint of adapters: everything that is trained. The rest is in the model that was begun with."""


@dataclass(frozen=True)
class AdapterTargets:
    """The places of adapters: names of linear layers, and of parameters with an expert after the other."""

    modules: tuple[str, ...]
    parameters: tuple[str, ...]


def targets_of(tune_config: TuneConfig, model: Any, parts: Parts, schedule: Schedule) -> AdapterTargets:
    """Return the places that the settings want adapters in. Raises InputError where nothing can have one, or what has one is
    trained.
    """
    adapters = tune_config.settings.adapters
    assert adapters is not None
    path = ("adapters", "target")
    wanted = select_parameters(tune_config, path, adapters.target, parts) - parts["router"]
    if any("[" in name for name in wanted):
        raise tune_config.error(
            path, f" is {'+'.join(adapters.target)}: a native mixture's experts get adapters together ('experts')"
        )
    linear = {f"{name}.weight" for name, module in model.named_modules() if _adaptable(name, module)}
    stacked = {name for name, parameter in model.named_parameters() if name in parts["experts"] and parameter.ndim == 3}
    found = wanted & (linear | stacked)
    if not found:
        what = "+".join(adapters.target)
        already = getattr(model.config, "adapters", None) is not None and what.startswith("experts")
        remedy = "which are adapters already: train them with 'train: experts'" if already else "where no linear layer lies"
        raise tune_config.error(path, f" is {what}, {remedy}")
    both = found & schedule.ever_trained
    if both:
        raise tune_config.error(("train",), f" means {min(both)} too, which adapters.target trains: leave it out of one of them")
    return AdapterTargets(
        tuple(sorted(name.removesuffix(".weight") for name in found & linear)),
        tuple(sorted(found & stacked)),
    )


def _adaptable(name: str, module: Any) -> bool:
    """Linear layers but heads: a head's adapter would untie it, and few clients load one."""
    return isinstance(module, torch.nn.Linear) and not name.startswith(("lm_head", "router"))


def add_adapters(model: Any, adapters: Adapters, targets: AdapterTargets, seed: int) -> Any:
    """Put adapters that change nothing yet on the model, in place; peft's handle to it. A is a function of the seed."""
    require("tune", "training adapters", "peft")
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=adapters.rank,
        lora_alpha=adapters.alpha or 2 * adapters.rank,  # type: ignore[arg-type, unused-ignore]
        use_rslora=adapters.rslora,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # peft asks in the old way
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def share_out(model: Any) -> None:
    """Share out adapters over the processes that share a sharded model, each layer's for itself (FSDP2), in place."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.distributed.fsdp import fully_shard

    sharded: set[Any] = {parameter for parameter in model.parameters() if isinstance(parameter, DTensor)}
    mesh = next(iter(sharded)).device_mesh
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for module in reversed(adapted):  # an adapter of an expert's other tensor may lie within
        fully_shard(module, mesh=mesh, ignored_params=sharded)
        sharded.update(parameter for parameter in module.parameters() if isinstance(parameter, DTensor))


def with_adapters(schedule: Schedule, model: Any) -> Schedule:
    """The schedule in the names that parameters have once adapters are there, which are open from the beginning."""
    names = [name for name, _ in model.named_parameters()]
    now = {name.replace(".base_layer", ""): name for name in names if ".lora_" not in name}
    unfreeze_steps = [(step, frozenset(_renamed(name, now) for name in opened)) for step, opened in schedule.unfreeze_steps]
    step, first = unfreeze_steps[0]
    return Schedule(((step, first | {name for name in names if ".lora_" in name}), *unfreeze_steps[1:]))


def _renamed(name: str, now: Mapping[str, str]) -> str:
    plain, number = split_slice(name)
    return now.get(plain, plain) + ("" if number is None else f"[{number}]")


def save_trained(model: Any, schedule: Schedule, folder: Path, *, write: bool = True) -> None:
    """Write what is trained. All processes that share a sharded model must call this, one of them with `write`."""
    parameters = dict(model.named_parameters())
    trained = {name: _whole(parameters[name].detach()).contiguous().cpu() for name in sorted(schedule.ever_trained)}
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained, folder / TRAINED)


def load_trained(model: Any, folder: Path) -> None:
    """Put what `save_trained` wrote into the model, of which a process may have a part."""
    parameters: Mapping[str, torch.Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in load_file(folder / TRAINED).items():
            local(parameters[name]).copy_(part_of(value, parameters[name]))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
