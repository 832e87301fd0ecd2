"""Training: the loss, where its gradient goes, gradient checkpointing, bfloat16, several processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from moerge.modeling import Routing, dense_name
from moerge.modeling.versions_moerge import CACHE
from tests.modeling.routed_models import batch, counting, dense_experts, gradients, prompts, routed

pytestmark = pytest.mark.slow

MIXES = ("layer", "output", "logits")


@pytest.mark.parametrize("mix", MIXES)
def test_the_loss_is_the_mean_over_labels_and_reaches_the_chosen_experts_alone(mix: str) -> None:
    model = routed(separate=["ffn", "attention"], mix=mix, routing={"kind": "random"}).train()
    ids, mask, labels = batch()
    out = model(ids, attention_mask=mask, labels=labels)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    assert out.get(CACHE) is None  # no cache is built while training
    reached = {dense_name(name)[1] for name, grad in gradients(model).items() if ".mlp." in name and grad.abs().sum() > 0}
    chosen = {expert for expert in range(3) if (out.routing.alpha[:, expert] > 0).any()}
    assert reached == chosen
    one = model.route(ids[:1])
    model.zero_grad()
    model(ids[:1], labels=ids[:1], routing=one).loss.backward()
    untouched = {dense_name(name)[1] for name, p in model.named_parameters() if ".mlp." in name and p.grad is None}
    assert untouched == {expert for expert in range(3) if not one.alpha[0, expert]} != set()


@pytest.mark.parametrize(
    ("mix", "kind", "reentrant"),
    [
        ("layer", "learned", False),
        ("layer", "random", True),
        ("output", "learned", False),
        ("output", "learned", True),
        ("logits", "perplexity", False),
    ],
)
def test_gradient_checkpointing_gives_the_same_gradients(mix: str, kind: str, reentrant: bool) -> None:
    model = routed(separate=["ffn"], mix=mix, routing={"kind": kind}).train()
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    with counting(model) as calls:
        actual = gradients(model)
    ids, mask, _ = batch()
    routing = model.route(ids, mask)
    passes = 3 if kind == "perplexity" else 0
    streams = 1 if mix == "layer" else len(routing.shares())
    assert calls["model.layers.0.self_attn.0"] == passes + 2 * streams  # each forward pass ran again
    assert actual.keys() == expected.keys() and ("router.weight" in actual) == (kind == "learned")
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)
    assert model(ids, attention_mask=mask, use_cache=True).get(CACHE) is None


@pytest.mark.parametrize("kind", ["perplexity", "task_vector", "random", "learned"])
@pytest.mark.parametrize("mix", MIXES)
def test_bfloat16(mix: str, kind: str) -> None:
    model = routed(dense_experts("qwen3"), separate=["ffn", "attention"], mix=mix, routing={"kind": kind})
    ids, mask, labels = batch()
    exact = model(ids, attention_mask=mask).logits
    model = copy.deepcopy(model).to(torch.bfloat16)
    out = model(ids, attention_mask=mask, labels=labels, routing=None)
    assert out.logits.dtype == (torch.float32 if mix == "logits" else torch.bfloat16)
    assert out.routing.alpha.dtype == out.routing.scores.dtype == torch.float32
    error = (out.logits.float() - exact)[mask.bool()].abs().mean() / exact[mask.bool()].abs().mean()
    assert error < (0.05 if kind in ("perplexity", "random") else 0.5)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (2, 12)


@pytest.mark.parametrize("mix", MIXES)
def test_on_several_processes_every_parameter_gets_a_gradient(mix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes wait for each other's gradients: an expert without sequences has to take part, with weight zero."""
    model = routed(mix=mix, routing={"kind": "fixed", "expert": "math"}).train()
    expected = gradients(model)
    monkeypatch.setattr("moerge.modeling.routed_moerge._several_processes", lambda: True)
    actual = gradients(model)
    assert actual.keys() == dict(model.named_parameters()).keys() > expected.keys()
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected.get(name, torch.zeros_like(gradient)))
    model.eval()
    assert gradients(model).keys() == expected.keys()


def test_mixing_probabilities_with_idle_experts_has_finite_gradients() -> None:
    """Two idle experts come first, for the row that the third has: log 0 must not reach anyone's gradient."""
    model = routed(mix="logits").train()
    ids = torch.stack(prompts(5, 5))
    alpha = torch.tensor([[0.0, 0, 1.0], [0, 0, 1.0]], requires_grad=True)
    routing = Routing(alpha, alpha, "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moerge.modeling.routed_moerge._several_processes", lambda: True)
        model(ids, labels=ids, routing=routing).loss.backward()
    grads = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in [*grads, alpha.grad])


def test_embeddings_can_be_resized_where_they_are_shared() -> None:
    model = routed(separate=["ffn"], routing={"kind": "uniform"})
    assert isinstance(model.get_input_embeddings(), nn.Embedding) and isinstance(model.get_output_embeddings(), nn.Linear)
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(torch.tensor([[65, 3]])).logits.shape == (1, 2, 70)
    assert model.config.vocab_size == model.config.expert_config.vocab_size == 70
    assert list(model.lm_head.state_dict()) == ["0.weight"]
    with pytest.raises(ValueError, match="every expert has its own embedding: it cannot be replaced by one"):
        routed().resize_token_embeddings(70, mean_resizing=False)
