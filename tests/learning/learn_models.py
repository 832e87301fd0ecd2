"""Tiny models with text for tests of learning, and the straightforward implementation that ours is compared with."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.func import functional_call

from moerge.learning.merged_parameters import merged_parameters
from moerge.learning.model import MergedParameter, MergingModel
from moerge.planning.build import build_plan
from moerge.planning.plan import Plan
from moerge.recipe import Recipe, load_recipe
from tests.helpers.tiny import EXPERTS, make_models


def make_recipe(
    folder: Path, *, experts: Sequence[str] = EXPERTS, models: Mapping[str, Path] | None = None, texts: int = 5, **sections: Any
) -> Recipe:
    """A recipe over float32 models with a file of text for each expert; `sections` replace or add to it."""
    models = models or make_models(folder, experts=experts, dtype="F32")
    for number, name in enumerate(models):
        lines = [{"text": " ".join(f"w{(7 * i * j + 5 * j + number) % 60 + 3}" for j in range(24))} for i in range(texts)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "base": str(models["base"]),
        "experts": {name: str(models[name]) for name in experts},
        "merge": {"method": "task_arithmetic", "scale": 0.3},
        "calibration": {name: str(folder / f"{name}.jsonl") for name in experts},
        **sections,
    }
    return load_recipe(recipe)


def dense_plan(recipe: Recipe) -> Plan:
    """The recipe's plan as if it were a dense merge."""
    return build_plan(recipe.model_copy(update={"moe": None}))


def slots_of(recipe: Recipe) -> list[MergedParameter]:
    """What learning works on."""
    assert recipe.learn is not None
    return merged_parameters(recipe, dense_plan(recipe), recipe.learn, ThreadPoolExecutor(2))


def straightforward(
    model: MergingModel, slots: Sequence[MergedParameter], coef_logits: Mapping[str, torch.Tensor], ids_1T: torch.Tensor
) -> Any:
    """The merged model's output with every merged parameter in memory at once, differentiable by autograd alone."""
    from torch.nn.utils import parametrize

    by_name = {slot.name: slot for slot in slots}
    weights = {}
    for name, module in model.module.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            slot = by_name[f"{name}.weight"]
            base = module.parametrizations.weight.original.to(torch.float64)
            theta_N = base.reshape(-1)
            assert slot.directions is not None
            tau_EN = torch.from_numpy(slot.directions.read()).to(torch.float64)
            c_EC = torch.sigmoid(coef_logits[slot.key])
            parts = [
                part_M + sum(c_EC[k, chunk] * tau_M for k, tau_M in enumerate(tau_EM))
                for chunk, (part_M, tau_EM) in enumerate(
                    zip(theta_N.chunk(c_EC.shape[1]), tau_EN.chunk(c_EC.shape[1], dim=1), strict=True)
                )
            ]
            weights[f"{name}.weight"] = torch.cat(parts).view(base.shape)
    plain: Any = type(model.module)(model.module.config).to(torch.float64).eval()
    shared = {name: value for name, value in model.module.named_parameters() if "parametrizations" not in name}
    plain.load_state_dict(shared, strict=False)
    return functional_call(plain, weights, (ids_1T,), {"use_cache": False, "output_hidden_states": True})
