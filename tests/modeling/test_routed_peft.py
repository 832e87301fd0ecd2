"""LoRA on the sequence-routed model: it starts as the model, trains what the chosen experts run, and is saved alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs moerge[models]")
peft = pytest.importorskip("peft", reason="needs peft")

from tests.modeling.routed_models import prompts, routed  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")]
KINDS = ["perplexity", "task_vector", "learned", "random"]


def model_of(kind: str = "perplexity", mix: str = "layer", top_k: int = 2) -> Any:
    return routed(separate=["ffn", "attention"], mix=mix, routing={"kind": kind, "top_k": top_k})


def with_lora(model: Any, targets: Any = ("q_proj", "v_proj", "down_proj"), **options: Any) -> Any:
    torch.manual_seed(0)
    targets = targets if isinstance(targets, str) else list(targets)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **options))


def batch() -> Any:
    return torch.stack(prompts(7, 7))


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(batch()).logits


def train(model: Any, steps: int = 2) -> None:
    model.train()
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5)
    for _ in range(steps):
        model(input_ids=batch(), labels=batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mix", ["layer", "output"])
def test_train_save_and_load(kind: str, mix: str, tmp_path: Path) -> None:
    before = logits(model_of(kind, mix))
    model = with_lora(model_of(kind, mix))
    assert torch.equal(logits(model), before)
    train(model)
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of(kind, mix), tmp_path).eval()
    assert torch.equal(logits(again), trained)
    text = model.generate(input_ids=batch(), max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(input_ids=batch(), max_new_tokens=4, do_sample=False, use_cache=False), text)
    if kind != "task_vector":  # merged, the adapter is part of the task vectors
        torch.testing.assert_close(logits(model.merge_and_unload()), trained, atol=1e-4, rtol=1e-4)


def test_only_chosen_experts_are_trained() -> None:
    model = with_lora(model_of(top_k=1))
    with torch.no_grad():
        chosen = set(model.get_base_model().route(batch()).alpha.argmax(-1).tolist())
    assert 0 < len(chosen) < 3
    model.train()
    model(input_ids=batch(), labels=batch()).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert trained and all("lora_B" in name for name in trained)  # B is zero, so A has no gradient yet
    assert {int(name.split(".self_attn.")[1][0]) for name in trained if ".self_attn." in name} == chosen
    assert {int(name.split(".mlp.")[1][0]) for name in trained if ".mlp." in name} == chosen


def test_task_vectors_are_those_of_the_model_s_own_weights() -> None:
    plain = model_of("task_vector")
    scores = plain.route(batch()).scores
    model = with_lora(plain, "all-linear")
    assert torch.equal(model.get_base_model().route(batch()).scores, scores)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # B is still zero
                parameter.mul_(100)
    assert torch.equal(model.get_base_model().route(batch()).scores, scores)


def test_the_gate_can_be_trained_beside_the_adapter(tmp_path: Path) -> None:
    model = with_lora(model_of("learned"), modules_to_save=["router"])
    gate = model.get_base_model().router.modules_to_save["default"].weight
    before = gate.detach().clone()
    train(model)
    assert not torch.equal(gate, before)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(model_of("learned"), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("mix", ["layer", "output"])
def test_gradient_checkpointing_gives_the_same_gradients(mix: str) -> None:
    """Also where experts have embeddings of their own, whose outputs must all ask for gradients."""

    def gradients(checkpointing: bool) -> dict[str, Any]:
        base = routed(mix=mix, routing={"kind": "uniform"})
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": True})
        model = with_lora(base)  # which makes the embeddings' outputs ask for gradients
        model.train()
        model(input_ids=batch(), labels=batch()).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        base.disable_input_require_grads()
        return found

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() and any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)
