"""Training with experts of different architectures: where the gradient goes, checkpointing, bfloat16, several processes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from moerge.modeling import MoergeHeterogeneousConfig, MoergeHeterogeneousForCausalLM, Routing
from moerge.modeling.versions_moerge import CACHE
from tests.modeling.mixed_models import FOUR, config_of, expert, mixed
from tests.modeling.routed_models import batch, gradients, prompts

pytestmark = pytest.mark.slow

EMBEDDINGS = ("shared", "separate")


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_the_gradient_reaches_the_chosen_experts_their_projectors_the_tables_and_the_gate(embedding: str) -> None:
    model = mixed(*FOUR, embedding=embedding, routing={"kind": "learned"}).train()
    ids, mask, labels = batch()
    out = model(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(out.loss, functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
    assert out.get(CACHE) is None  # no cache is built while training
    one = (out.routing.alpha > 0)[0].nonzero()[:, 0].tolist()
    model.zero_grad()
    model(ids[:1], labels=ids[:1]).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    by_expert = {n: {name for name in reached if f".{n}." in name.split("layers")[0]} for n in range(4)}
    parts = ["projectors_in", "projectors_out", "experts"] if embedding == "shared" else ["experts"]
    for number in range(4):
        found = {name.split(".")[1] for name in by_expert[number] if "embed" not in name}
        assert found == (set(parts) if number in one else set()), number
    shared = {"model.embed_tokens.weight", "lm_head.weight"} if embedding == "shared" else set()
    assert {"router.weight", *shared} <= reached


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_gradient_checkpointing_gives_the_same_gradients(embedding: str, reentrant: bool) -> None:
    model = mixed("llama", "gpt_neox", "gpt2", "mamba", embedding=embedding, routing={"kind": "learned"}).train()
    expected = gradients(model)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    calls: list[int] = []
    for one in (model.model.experts[0].model.layers[0].self_attn, model.model.experts[1].gpt_neox.layers[0].attention):
        one.register_forward_hook(lambda *_: calls.append(1))
    actual = gradients(model)
    alpha = model.route(*batch()[:2]).alpha
    assert len(calls) == 2 * int((alpha[:, :2] > 0).any(0).sum())  # each forward pass ran again
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, atol=1e-6, rtol=1e-5)
    ids, mask, _ = batch()
    assert model(ids, attention_mask=mask, use_cache=True).get(CACHE) is None


@pytest.mark.parametrize("kind", ["perplexity", "learned"])
@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_bfloat16(embedding: str, kind: str) -> None:
    model = mixed(*FOUR, embedding=embedding, routing={"kind": kind, "top_k": 4})
    ids, mask, labels = batch()
    exact = model(ids, attention_mask=mask).logits
    model = copy.deepcopy(model).to(torch.bfloat16)
    out = model(ids, attention_mask=mask, labels=labels)
    assert out.logits.dtype == (torch.float32 if embedding == "separate" else torch.bfloat16)
    assert out.routing.alpha.dtype == out.routing.scores.dtype == torch.float32
    error = (out.logits.float() - exact)[mask.bool()].abs().mean() / exact[mask.bool()].abs().mean()
    assert error < 0.06
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (2, 12)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_on_several_processes_every_parameter_gets_a_gradient(embedding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes wait for each other's gradients: an expert without sequences has to take part, with weight zero."""
    model = mixed(*FOUR, embedding=embedding, routing={"kind": "fixed", "expert": "code"}).train()
    expected = gradients(model)
    monkeypatch.setattr("moerge.modeling.routed_moerge._several_processes", lambda: True)
    actual = gradients(model)
    assert actual.keys() == dict(model.named_parameters()).keys() > expected.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected.get(name, torch.zeros_like(gradient)), atol=1e-7, rtol=1e-6)
    model.eval()
    assert gradients(model).keys() == expected.keys()
    alpha = torch.tensor([[0.0, 0, 1, 0], [0, 0, 1, 0]], requires_grad=True)  # two idle experts before the one that computes
    ids, _, labels = batch()
    model.train()(ids, labels=labels, routing=Routing(alpha, alpha, "")).loss.backward()
    assert alpha.grad.isfinite().all()


@torch.no_grad()
def test_routing_in_training_mode_is_that_of_evaluation() -> None:
    model = mixed("gpt2", "bloom", "llama", routing={"kind": "perplexity"})
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    ids = torch.stack(prompts(9))
    expected = model.route(ids)
    model.train()
    assert torch.equal(model.route(ids).scores, expected.scores)
    assert all(module.training for module in model.modules())


def test_embeddings_can_be_resized_where_they_are_shared(tmp_path: Path) -> None:
    model = mixed("llama", "phi", routing={"kind": "uniform"})
    model.resize_token_embeddings(70, mean_resizing=False)
    assert model(torch.tensor([[65, 3]])).logits.shape == (1, 2, 70)
    assert model.config.vocab_size == 70 and model.lm_head.bias.shape == (70,)  # Phi's head has a bias
    assert [model.config.expert_config(number).vocab_size for number in (0, 1)] == [64, 64]
    model.save_pretrained(tmp_path)
    assert MoergeHeterogeneousForCausalLM.from_pretrained(tmp_path).get_input_embeddings().num_embeddings == 70
    message = "every expert has its own embedding and head: they cannot be replaced by one"
    with pytest.raises(ValueError, match=message):
        mixed("llama", "phi", embedding="separate").resize_token_embeddings(70, mean_resizing=False)


def test_what_is_new_is_drawn_as_torch_draws_it() -> None:
    torch.manual_seed(0)
    projectors = {"linear": True, "width": 200}
    config = config_of([expert("llama"), expert("gpt2")], "shared", routing={"kind": "learned"}, projectors=projectors)
    model = MoergeHeterogeneousForCausalLM(MoergeHeterogeneousConfig(**config))
    for layer in (model.model.projectors_in[0].up, model.model.projectors_out[1].down, model.router):
        bound = layer.in_features**-0.5
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias is None or 0.5 * bound < layer.bias.abs().max() <= bound
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("embedding", EMBEDDINGS)
def test_the_inputs_of_frozen_experts_can_ask_for_gradients(embedding: str) -> None:
    """What adapters with gradient checkpointing need: every embedding that begins a stream."""
    model = mixed("llama", "gpt2", embedding=embedding, routing={"kind": "uniform"}).requires_grad_(False).train()
    model.enable_input_require_grads()
    assert model(torch.stack(prompts(4))).logits.requires_grad
    model.set_routing("fixed", expert="code")
    assert model(torch.stack(prompts(4))).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(torch.stack(prompts(4))).logits.requires_grad


def test_fsdp_shards_the_experts_layer_by_layer_and_no_tied_tensor_twice() -> None:
    plan = {
        "model.experts.*.model.layers.*": "free_full_weight",
        "model.experts.*.model.norm": "keep_full_weight",
        "model.experts.*.gpt_neox.layers.*": "free_full_weight",
    }
    outside = {f"model.{part}": "free_full_weight" for part in ("embed_tokens", "projectors_in.*", "projectors_out.*")}
    assert mixed(*FOUR)._fsdp_plan == plan | outside
    assert mixed(*FOUR, embedding="separate")._fsdp_plan == plan
    untied = mixed("llama", embedding="separate")._fsdp_plan
    assert untied.keys() - plan.keys() == {"model.experts.*.model.embed_tokens", "model.experts.*.lm_head"}
