"""Each loss by its formula, by finite differences in float64, and by what it does to a router."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from moerge.distillation import DistillationTarget, hidden_distance
from moerge.tuning import losses

pytestmark = pytest.mark.slow


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


IDS = torch.tensor([[1, 4, 2, 0, 3], [3, 3, 0, 1, 4]])
LOAD = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64)
ALL = DistillationTarget(draw(6, 5, seed=1), None, (draw(2, 3, 4, seed=2), draw(2, 3, 4, seed=3)))
TOP = DistillationTarget(*draw(6, 5, seed=1).topk(2), hidden=())
LOSSES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = {
    "cross entropy": (lambda x: losses.cross_entropy(x, IDS), (2, 5, 5)),
    "load balance": (lambda x: losses.load_balance(x, LOAD), (7, 4)),
    "router z": (losses.router_z, (7, 4)),
    "router entropy": (losses.router_entropy, (7, 4)),
    "KL, all logits": (lambda x: losses.forward_kl(x, ALL, 2.0), (6, 5)),
    "KL, the largest": (lambda x: losses.forward_kl(x, TOP, 0.7), (6, 5)),
    "hidden states": (lambda x: hidden_distance([x, 2 * x], ALL), (2, 3, 4)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    loss, shape = LOSSES[name]
    x = draw(*shape, seed=9).requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    step, flat = 1e-6, x.detach().flatten()
    for index in range(flat.numel()):
        moved = flat.repeat(2, 1)
        moved[0, index] += step
        moved[1, index] -= step
        expected = (loss(moved[0].view(shape)) - loss(moved[1].view(shape))) / (2 * step)
        assert x.grad.flatten()[index].item() == pytest.approx(expected.item(), abs=1e-8, rel=1e-6)


def test_cross_entropy_predicts_the_next_token() -> None:
    logits = draw(2, 5, 5)
    expected = [-logits[b, t].log_softmax(-1)[IDS[b, t + 1]] for b in range(2) for t in range(4)]
    assert losses.cross_entropy(logits, IDS).item() == pytest.approx(sum(expected).item() / 8)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_even_load_costs_one_and_a_collapsed_router_as_much_as_it_has_experts(top_k: int) -> None:
    even = torch.full((8, 4), 0.0)
    for row in range(8):
        even[row, [(row + k) % 4 for k in range(top_k)]] = 30.0
    load = losses.load(even, top_k)
    assert load.tolist() == [0.25] * 4
    assert losses.load_balance(even, load).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)
    assert losses.load_balance(collapsed, losses.load(collapsed, 1)).item() == pytest.approx(4.0)
    assert losses.load(collapsed, 1).tolist() == [1, 0, 0, 0]


def test_load_balance_is_a_top_kth_of_transformers_own() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    scores = draw(40, 6).float()
    for top_k in (1, 2, 4):
        ours = losses.load_balance(scores, losses.load(scores, top_k)) * top_k
        assert ours.item() == pytest.approx(load_balancing_loss_func((scores,), 6, top_k).item(), rel=1e-6)


def test_a_collapsed_router_recovers() -> None:
    """Tokens of four kinds, and a router that sends all of them to expert 0."""
    tokens_NH = F.one_hot(torch.arange(64) % 4, 4).float() + 0.1 * draw(64, 4).float()
    gate = torch.zeros(4, 4)
    gate[0] = 3.0
    gate.requires_grad_()
    optimizer = torch.optim.AdamW([gate], lr=0.02)
    loads = []
    for _ in range(300):
        scores_NE = tokens_NH @ gate.T
        load_E = losses.load(scores_NE, 1)
        loads.append(load_E)
        optimizer.zero_grad()
        losses.load_balance(scores_NE, load_E).backward()
        optimizer.step()
    assert loads[0].tolist() == [1, 0, 0, 0]
    assert torch.stack(loads[-50:]).mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.03)
    assert losses.router_entropy(tokens_NH @ gate.T).item() <= math.log(4)


def test_router_z_pulls_the_scores_towards_zero() -> None:
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert losses.router_z(scores).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


def test_kl_is_zero_for_the_teacher_itself_and_scaled_by_the_squared_temperature() -> None:
    logits = draw(6, 5, seed=1)
    assert losses.forward_kl(logits, ALL, 2.0).item() == pytest.approx(0, abs=1e-12)
    student = draw(6, 5, seed=4)
    p, q = (ALL.logits / 2).softmax(-1), (student / 2).softmax(-1)
    assert losses.forward_kl(student, ALL, 2.0).item() == pytest.approx(4 * (p * (p / q).log()).sum(-1).mean().item())


def test_kl_to_the_largest_logits_has_the_teachers_probabilities_among_them() -> None:
    student = draw(6, 5, seed=4)
    p = TOP.logits.softmax(-1)
    q = student.softmax(-1).gather(-1, TOP.ids)
    assert losses.forward_kl(student, TOP, 1.0).item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item())


def test_entropy_of_a_router_that_does_not_care_is_log_e() -> None:
    assert losses.router_entropy(torch.ones(3, 5)).item() == pytest.approx(math.log(5))
