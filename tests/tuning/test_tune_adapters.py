"""Adapters that are trained instead of weights, and experts that are adapters already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import moerge as package
from moerge.modeling import register
from moerge.modeling.lowrank_moerge import AdaptedLinear, computing
from moerge.tuning.adapters import add_adapters, targets_of
from moerge.tuning.parts import make_schedule, parts_of
from moerge.tuning.run import tune
from moerge.tuning.settings import load_tuning
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import moerge
from tests.helpers.tiny import make_models, read_tensors, read_values, write_recipe
from tests.tuning.tune_models import moved, rows, run, stop_after, write_texts, write_tuning

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")]
IDS = torch.arange(3, 19)[None]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture routed by sequence, whose experts are adapters on one base; stored in bfloat16."""
    found = tmp_path_factory.mktemp("kept")
    make_models(found, experts=[], dtype="BF16")
    for number, name in enumerate(("math", "code")):
        factors: dict[str, np.ndarray] = {}
        for layer in (0, 1):
            factors |= low_rank(f"model.layers.{layer}.mlp.up_proj", (24, 16), rank=2 + number, seed=number)
        write_adapter(found / name, factors, dtype="BF16", r=2 + number, lora_alpha=4)
    moe = {"format": "moerge", "adapters": "keep", "router": {"kind": "learned"}}
    package.merge(write_recipe(found, experts=["math", "code"], moe=moe), found / "moe", threads=1)
    write_texts(found)
    return found


def rank_of(change: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(change.astype(np.float64), tol=1e-6))


def test_native_experts_through_adapters_of_their_own(folder: Path) -> None:
    """3-D parameters: factors for each expert, merged into the layout on disk; each matrix changes by the rank that was asked."""
    facts = run(folder, "experts", adapters={"rank": 2, "target": "experts"}, learning_rate=3e-2)
    assert facts["trained_parameters"] == 2 * 4 * 2 * ((16 + 2 * 24) + (24 + 16))
    changed = moved(folder / "moe", folder / "experts")
    assert changed == {name for name in read_tensors(folder / "moe") if ".experts." in name}
    before, after = read_values(folder / "moe"), read_values(folder / "experts")
    for name in changed:
        assert 1 <= rank_of(after[name] - before[name]) <= 2, name
    losses = [row["cross_entropy"] for row in rows(folder / "experts")]
    assert np.mean(losses[-2:]) < losses[0]
    assert moerge("verify", folder / "experts").code == 0


@pytest.mark.parametrize("kind", ["native", "by_sequence"])
def test_backbone_and_router_together(kind: str, folder: Path, by_sequence: Path) -> None:
    place = folder if kind == "native" else by_sequence
    facts = run(place, "mixed", adapters={"rank": 2, "alpha": 2, "target": "backbone"}, train="router", steps=2)
    attention = 2 * 2 * ((16 + 16) * 2 + (16 + 8) * 2)
    assert facts["trained_parameters"] == attention + facts["parameters"]["router"]
    changed = moved(place / "moe", place / "mixed")
    assert changed == {n for n in read_tensors(place / "moe") if "self_attn" in n or "gate.weight" in n or n == "router.weight"}


def test_one_expert_of_a_sequence_routed_mixture(by_sequence: Path) -> None:
    run(by_sequence, "single", adapters={"rank": 1, "target": "experts.code"}, steps=2)
    changed = moved(by_sequence / "moe", by_sequence / "single")
    assert changed and all(".mlp.1." in name for name in changed)


def test_interrupted_and_continued(folder: Path) -> None:
    settings: dict[str, Any] = {"adapters": {"rank": 2}, "train": "router", "opens": [{"step": 4, "train": "*norm.weight"}]}
    settings |= {"save_every": 2, "schedule": "linear", "losses": {"load_balance": 0.1}}
    run(folder, "whole", **settings)
    path = write_tuning(folder, "parts.yaml", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune(path, folder / "parts", progress=stop_after(3))
    checkpoint = folder / ".parts.moerge-tuning" / "checkpoints" / "checkpoint-2"
    assert (checkpoint / "trained.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    result = tune(path, folder / "parts", resume=True)
    assert result is not None and result.facts["resumed_after_step"] == 2
    assert rows(folder / "parts") == rows(folder / "whole")
    assert moved(folder / "whole", folder / "parts") == set()
    size = sum(file.stat().st_size for file in checkpoint.parent.glob("*")) if checkpoint.exists() else 0
    assert size == 0 and result.facts["checkpoint_bytes"] == 12 * result.facts["trained_parameters"]


@pytest.mark.parametrize("kind", ["native", "by_sequence"])
def test_saved_as_an_adapter(kind: str, folder: Path, by_sequence: Path) -> None:
    """What peft makes of the model and the adapter is the merged result."""
    place = folder if kind == "native" else by_sequence
    settings: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2}
    run(place, "adapter", adapters={"rank": 2, "save": "adapter", "rslora": True}, **settings)
    run(place, "merged", adapters={"rank": 2, "rslora": True}, **settings)
    assert (place / "adapter" / "adapter_model.safetensors").is_file()
    register()
    auto: Any = AutoModelForCausalLM
    model: Any = peft.PeftModel.from_pretrained(auto.from_pretrained(place / "moe"), str(place / "adapter"))
    wanted = auto.from_pretrained(place / "merged")
    plain = auto.from_pretrained(place / "moe")
    torch.testing.assert_close(model(IDS).logits, wanted(IDS).logits, rtol=0, atol=2e-6)
    assert (plain(IDS).logits - wanted(IDS).logits).abs().max() > 1e-3
    recipe = {"base": str(place / "moe"), "experts": {"tuned": str(place / "adapter")}, "merge": {"method": "average"}}
    package.merge({**recipe, "dtype": "float32"}, place / "read")
    read, saved = read_values(place / "read"), read_values(place / "merged")
    assert read.keys() == saved.keys()
    for name in read:
        np.testing.assert_allclose(read[name], saved[name], rtol=1e-6, atol=1e-6, err_msg=name)
    assert "LORA, rsLoRA, rank 2" in moerge("inspect", place / "adapter").out
    assert moerge("verify", place / "adapter").code == 0


def test_experts_that_are_adapters_already(kept: Path) -> None:
    facts = run(kept, "factors", train="experts", learning_rate=1e-2)
    assert facts["parameters"]["experts"] == facts["trained_parameters"] == 2 * (2 + 3) * (16 + 24)
    changed = moved(kept / "moe", kept / "factors")
    assert changed == {name for name in read_tensors(kept / "moe") if ".adapters." in name}
    run(kept, "one", train="experts.math", learning_rate=1e-2, steps=2)
    assert all(".adapters.1." in name for name in moved(kept / "moe", kept / "one"))
    run(kept, "all", train="all", steps=1, learning_rate=1e-2)
    assert any(".mlp.0.up_proj.weight" in name for name in moved(kept / "moe", kept / "all"))
    run(kept, "around", adapters={"rank": 2, "target": "backbone"}, steps=1, learning_rate=1e-1)
    around = moved(kept / "moe", kept / "around")
    assert around and not any(".adapters." in name or "norm" in name for name in around)
    register()
    assert type(AutoModelForCausalLM.from_pretrained(kept / "around")).__name__ == "MoergeForCausalLM"


@pytest.mark.parametrize("kind", ["native", "by_sequence"])
def test_gradients_of_factors_follow_from_those_of_the_merged_weights(kind: str, folder: Path, by_sequence: Path) -> None:
    """The chain rule: with W' = W + s B A and G the gradient of W', those of A and B are s B^T G and s G A^T."""
    place = folder if kind == "native" else by_sequence
    register()
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(place / "moe").eval()
    request = load_tuning(write_tuning(place, adapters={"rank": 2}))
    assert request.settings.adapters is not None
    parts = parts_of(model)
    targets = targets_of(request, model, parts, make_schedule(request, parts))
    handle = add_adapters(model, request.settings.adapters, targets, 0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model(IDS, labels=IDS).loss.backward()
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_delta_weight")}
    factors, changes = {}, {}
    for name, layer in layers.items():
        weight = f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"
        factors[weight] = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        changes[weight] = layer.get_delta_weight("default")
    assert len(factors) == len(targets.modules) + len(targets.parameters)
    merged = handle.merge_and_unload()
    for parameter in merged.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    merged(IDS, labels=IDS).loss.backward()
    gradients = dict(merged.named_parameters())
    seen = 0
    for weight, (a, b) in factors.items():
        outer = gradients[weight].grad
        if outer is None:  # an expert that was not chosen
            assert a.grad is None or not a.grad.any()
            continue
        wanted = torch.autograd.grad(changes[weight], [a, b], outer)
        for mine, theirs in zip((a.grad, b.grad), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        seen += bool(outer.any())
    assert seen >= len(factors) / 2


def test_gradients_of_kept_adapters(kept: Path) -> None:
    """An adapted layer in float64 against finite differences; in the model, the factors' from those of a full expert."""
    layer = AdaptedLinear(torch.nn.Linear(5, 4, dtype=torch.float64), {1: (2, 0.7)}).double()
    torch.nn.init.normal_(layer.adapters["1"].B)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def through(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        with computing(1):
            return torch.func.functional_call(layer, dict(zip(("adapters.1.A", "adapters.1.B"), factors, strict=True)), (x,))

    assert torch.autograd.gradcheck(through, (x, layer.adapters["1"].A, layer.adapters["1"].B))
    register()
    auto: Any = AutoModelForCausalLM
    moe = {"format": "moerge", "router": {"kind": "learned"}}
    recipe = write_recipe(kept, "full.yaml", experts=["math", "code"], moe=moe, dtype="float32")
    package.merge(recipe, kept / "full", threads=1)
    models = [auto.from_pretrained(kept / name, dtype=torch.float32) for name in ("moe", "full")]
    for model in models:
        model.set_routing("uniform")
        model(IDS, labels=IDS).loss.backward()
    for number in (1, 2):
        shared, full = models[0].model.layers[0].mlp[0].up_proj, models[1].model.layers[0].mlp[number].up_proj
        adapter = shared.adapters[str(number)]
        torch.testing.assert_close(adapter.A.grad, adapter.scale * adapter.B.T @ full.weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(adapter.B.grad, adapter.scale * full.weight.grad @ adapter.A.T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapters": {"target": "router"}}, "adapters.target names the router, which is small: train it whole"),
        ({"adapters": {"target": "nothing.*"}}, "adapters.target: 'nothing.*' is none of router, projectors"),
        ({"adapters": {"target": "*norm*"}}, "adapters.target is *norm*, where no linear layer lies"),
        ({"adapters": {"target": "experts.math"}}, "a native mixture's experts get adapters together ('experts')"),
        ({"adapters": {}, "train": "all"}, "train means model.layers.0.mlp.experts.down_proj too, which adapters.target trains"),
        ({"adapters": {"save": "adapter"}, "train": "router"}, "train trains weights too, which have no place in an adapter"),
        ({"adapters": {"save": "adapter"}, "save_dtype": "bfloat16"}, "save_dtype has no effect on adapters"),
        ({"adapters": {"rank": 0}}, "adapters.rank"),
        ({"adapters": {"ranks": 4}}, "adapters.ranks"),
    ],
)
def test_mistakes(folder: Path, changes: dict[str, Any], message: str) -> None:
    result = moerge("tune", write_tuning(folder, "bad.yaml", **changes), folder / "never")
    assert (result.code, result.out) == (2, ""), result
    assert message in result.err and len(result.err.splitlines()) == 1
    assert not (folder / "never").exists() and not (folder / ".never.moerge-tuning").exists()


def test_adapters_on_adapters_are_refused(kept: Path) -> None:
    failed = moerge("tune", write_tuning(kept, "bad.yaml", adapters={"target": "experts"}), kept / "never")
    assert "adapters.target is experts, which are adapters already: train them with 'train: experts'" in failed.err


def test_a_dry_run_counts_adapters(folder: Path) -> None:
    figures = moerge("tune", write_tuning(folder, adapters={"rank": 4}), "--dry-run", "--json").json
    assert figures["trained_parameters"] == 4 * 2 * (4 * ((16 + 48) + (24 + 16)) + (16 + 16) * 2 + (16 + 8) * 2)
    assert figures["checkpoint_bytes"] == 12 * figures["trained_parameters"]
