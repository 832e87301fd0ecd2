"""LoRA on the model of different architectures: it starts as the model, trains what the chosen experts run, is saved alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs moerge[models]")
peft = pytest.importorskip("peft", reason="needs peft")

from tests.modeling.mixed_models import FOUR, mixed  # noqa: E402
from tests.modeling.routed_models import prompts  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "query_key_value", "up"]])
@pytest.mark.parametrize("embedding", ["shared", "separate"])
def test_train_save_and_load(embedding: str, targets: Any, tmp_path: Path) -> None:
    def base() -> Any:
        return mixed(*FOUR, embedding=embedding, routing={"kind": "learned"})

    ids = torch.stack(prompts(7, 7))
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": targets, "exclude_modules": ["router", "lm_head"], "modules_to_save": ["router"]}
    model = peft.get_peft_model(base(), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        before = model(ids).logits
        torch.testing.assert_close(before, base()(ids).logits)
        chosen = set((model.get_base_model().route(ids).alpha > 0).any(0).nonzero()[:, 0].tolist())
    model.train()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert {int(name.split("experts.")[1].split(".")[0]) for name in trained if ".experts." in name} == chosen
    assert any("router" in name for name in trained) and all("lora_" in name or "router" in name for name in trained)
    torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.5).step()
    model.eval()
    with torch.no_grad():
        after = model(ids).logits
    assert not torch.allclose(after, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, after)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, after, atol=1e-4, rtol=1e-4)
    text = again.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False), text)
