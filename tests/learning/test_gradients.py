"""The streamed merge against autograd through all parameters at once, and against finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moerge.distillation import DistillationTarget, drift_penalty, entropy, hidden_distance, soft_cross_entropy
from moerge.learning.model import MergingModel
from tests.learning.learn_models import dense_plan, make_recipe, slots_of, straightforward

pytestmark = pytest.mark.slow

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(autouse=True)
def norms_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' norms compute in float32, whatever the model's type: too coarse for differences."""

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def learning_model(recipe: Any, chunks: int = 1) -> tuple[MergingModel, dict[str, torch.Tensor], list[Any]]:
    slots = slots_of(recipe)
    generator = torch.Generator().manual_seed(0)
    keys = dict.fromkeys(slot.key for slot in slots if slot.key)
    coef_logits = {key: torch.randn(3, chunks, generator=generator, dtype=torch.float64).requires_grad_() for key in keys}
    model = MergingModel(dense_plan(recipe).config, slots, coef_logits, 0.3, dtype="float64", device="cpu")
    return model, coef_logits, slots


def loss_of(output: Any, target: DistillationTarget) -> torch.Tensor:
    logits = output.logits[0].double()
    return soft_cross_entropy(logits, target, 2.0) + hidden_distance([output.hidden_states[1][0]], target) + 0.1 * entropy(logits)


def make_target() -> DistillationTarget:
    generator = torch.Generator().manual_seed(1)
    return DistillationTarget(
        torch.randn(8, 64, generator=generator, dtype=torch.float64),
        None,
        (torch.randn(8, 16, generator=generator, dtype=torch.float64),),
    )


@pytest.mark.parametrize("granularity", ["tensor", "layer"])
@pytest.mark.parametrize("merge", ["task_arithmetic", "ties", "dare"])
def test_gradients_equal_those_of_the_straightforward_implementation(tmp_path: Path, merge: str, granularity: str) -> None:
    recipe = make_recipe(tmp_path, merge={"method": merge, "scale": 0.3}, learn={"granularity": granularity, "dtype": "float64"})
    model, coef_logits, slots = learning_model(recipe, chunks=3)
    streamed = loss_of(model.forward({"input_ids": IDS}, 0), make_target())
    streamed.backward()
    found = {key: a_EC.grad.clone() for key, a_EC in coef_logits.items()}
    for a_EC in coef_logits.values():
        a_EC.grad = None
    plain = loss_of(straightforward(model, slots, coef_logits, IDS), make_target())
    plain.backward()
    assert streamed.item() == pytest.approx(plain.item(), abs=1e-12)
    for key, a_EC in coef_logits.items():
        torch.testing.assert_close(found[key], a_EC.grad, rtol=1e-9, atol=1e-13)
        assert found[key].abs().max() > 1e-8


def test_gradients_equal_finite_differences(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, learn={"dtype": "float64"})
    model, coef_logits, _ = learning_model(recipe, chunks=2)
    target = make_target()

    def objective() -> torch.Tensor:
        return loss_of(model.forward({"input_ids": IDS}, 0), target) + 0.8 * drift_penalty(coef_logits.values(), 0.3)

    objective().backward()
    step = 1e-5
    for a_EC in coef_logits.values():
        for index in range(a_EC.numel()):
            flat = a_EC.data.view(-1)
            value = flat[index].item()
            losses = []
            for side in (1, -1):
                flat[index] = value + side * step
                with torch.no_grad():
                    losses.append(objective().item())
            flat[index] = value
            expected = (losses[0] - losses[1]) / (2 * step)
            assert a_EC.grad.view(-1)[index].item() == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_top_logits_are_the_whole_target_where_all_are_kept() -> None:
    target = make_target()
    top = target.logits.topk(64, dim=-1)
    kept = DistillationTarget(top.values, top.indices, target.hidden)
    logits = torch.randn(8, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert soft_cross_entropy(logits, kept, 1.5).item() == pytest.approx(
        soft_cross_entropy(logits, target, 1.5).item(), abs=1e-12
    )


def test_both_implementations_learn_the_same_coefficients(tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path, learn={"dtype": "float64"})
    model, coef_logits, slots = learning_model(recipe)
    first = {key: a_EC.detach().clone() for key, a_EC in coef_logits.items()}
    learned = []
    for forward in (lambda: model.forward({"input_ids": IDS}, 0), lambda: straightforward(model, slots, coef_logits, IDS)):
        for key, a_EC in coef_logits.items():
            a_EC.data.copy_(first[key])
        optimizer = torch.optim.AdamW(list(coef_logits.values()), lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(forward(), make_target()).backward()
            optimizer.step()
        learned.append({key: torch.sigmoid(a_EC.detach()).clone() for key, a_EC in coef_logits.items()})
    for key, c_EC in learned[0].items():
        torch.testing.assert_close(c_EC, learned[1][key], rtol=1e-7, atol=1e-9)
        assert (c_EC - torch.sigmoid(first[key])).abs().max() > 0.05
