"""Tiny dense experts and the sequence-routed models made of them, in memory.

dense = dense_experts("llama", tied=True)                  # base, math, code
model = routed(dense, separate=["ffn"], mix="output", routing={"kind": "uniform"})
dense_path(model, 1)                                       # the dense model that expert 1's path is
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from moerge.modeling import ROLES, MoergeConfig, MoergeForCausalLM, dense_name, role_of, separate_name
from moerge.modeling.versions_moerge import CACHE
from tests.helpers.tiny import EXPERTS, VOCABULARY, llama_config

NAMES = ["base", *EXPERTS[:2]]
SIZES: dict[str, Any] = {
    **{key: value for key, value in llama_config().items() if isinstance(value, int) and not isinstance(value, bool)},
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda **more: LlamaConfig(**SIZES, **more),
    "mistral": lambda **more: MistralConfig(**SIZES, sliding_window=4, **more),
    "qwen2": lambda **more: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1, **more),
    "qwen3": lambda **more: Qwen3Config(**SIZES, head_dim=8, **more),
}
LAYOUTS = (["ffn"], ["ffn", "attention"], list(ROLES))
"""The paper's two settings, and everything separate."""


@cache
def dense_experts(family: str = "llama", *, tied: bool = False, experts: int = 3) -> tuple[PreTrainedModel, ...]:
    """Dense models that differ in every tensor; they are shared between tests, which must not change them."""
    models = []
    for expert in range(experts):
        model = AutoModelForCausalLM.from_config(CONFIGS[family](tie_word_embeddings=tied)).eval()
        source = torch.Generator().manual_seed(expert)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=source) + float("norm" in name))
        models.append(model)
    return tuple(models)


def routed(
    dense: Sequence[PreTrainedModel] | None = None,
    *,
    separate: Sequence[str] = tuple(ROLES),
    mix: str = "layer",
    routing: dict[str, Any] | None = None,
) -> MoergeForCausalLM:
    """A routed model of these experts; what is shared is their mean."""
    dense = dense or dense_experts()
    config = MoergeConfig(
        expert_config=dense[0].config.to_dict(),
        expert_names=NAMES[: len(dense)],
        separate=list(separate),
        mix=mix,
        routing=routing or {"kind": "perplexity"},
    )
    model = MoergeForCausalLM(config).eval()
    states = [expert.state_dict() for expert in dense]
    tensors = {}
    for name in states[0]:
        if role_of(name) in separate:
            tensors |= {separate_name(name, expert): state[name] for expert, state in enumerate(states)}
        else:
            tensors[separate_name(name, 0)] = sum(state[name] for state in states) / len(states)
    if config.routing["kind"] == "learned":
        source = torch.Generator().manual_seed(9)
        tensors["router.weight"] = torch.randn(model.router.weight.shape, generator=source)
    model.load_state_dict(tensors)
    return model


def dense_path(model: MoergeForCausalLM, expert: int) -> PreTrainedModel:
    """The dense model with the tensors that this expert's path uses."""
    dense = AutoModelForCausalLM.from_config(model.config.expert_config).eval()
    tensors = {}
    for name, value in model.state_dict().items():
        if name != "router.weight":
            plain, number = dense_name(name)
            if number == (expert if role_of(plain) in model.config.separate else 0):
                tensors[plain] = value
    dense.load_state_dict(tensors)
    return dense


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Token sequences without special tokens."""
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=source) for length in lengths]


def padded(sequences: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """A batch of them and its mask."""
    longest = max(map(len, sequences))
    ids, mask = torch.zeros(len(sequences), longest, dtype=torch.long), torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each attention, FFN and head runs meanwhile, by name."""
    calls: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[0].endswith(("self_attn", "mlp", "lm_head"))
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and labels of two prompts."""
    ids, mask = padded(prompts(9, 6), "right")
    return ids, mask, ids.masked_fill(mask == 0, -100)


def gradients(model: Any) -> dict[str, Tensor]:
    """Of the loss on `batch`, by parameter."""
    model.zero_grad()
    ids, mask, labels = batch()
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@torch.no_grad()
def check_cache(model: Any, *, crops: bool = True) -> None:
    """The cache selects, repeats and forgets rows and, if it `crops`, tokens."""
    ids = torch.stack(prompts(6, 6, 6, 6, seed=2))
    step = torch.tensor([[7], [8], [9], [10]])

    def after(cache: Any, rows: Tensor) -> Tensor:
        return model(step[rows], **{CACHE: cache}).logits

    expected = after(model(ids)[CACHE], torch.arange(4))
    for rows in ([3, 1], [2], [0, 0, 1, 3, 3, 3]):
        cache = model(ids)[CACHE]
        cache.batch_select_indices(torch.tensor(rows))
        assert cache.batch_size == len(rows)
        torch.testing.assert_close(after(cache, torch.tensor(rows)), expected[rows], atol=1e-5, rtol=1e-5)
    cache = model(ids)[CACHE]
    cache.batch_repeat_interleave(2)
    twice = torch.arange(4).repeat_interleave(2)
    torch.testing.assert_close(after(cache, twice), expected[twice], atol=1e-5, rtol=1e-5)
    cache = model(ids)[CACHE]
    if crops:
        assert cache.is_croppable
        after(cache, torch.arange(4))
        cache.crop(-1)
        torch.testing.assert_close(after(cache, torch.arange(4)), expected, atol=1e-5, rtol=1e-5)
    cache.reset()
    assert (cache.batch_size, cache.get_seq_length(), cache.is_initialized, len(cache)) == (-1, 0, False, 0)
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, model(ids).logits)


@torch.no_grad()
def check_without_moerge(model: Any, folder: Path) -> None:
    """What `folder` holds of the model gives the same without moerge; also saved again, and from a relative path."""
    ids, mask = padded(prompts(6, 4), "left")
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch.save({"ids": ids, "mask": mask, "options": options}, folder / "case.pt")
    environment = {**os.environ, "HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _WITHOUT_MOERGE, str(folder)]
    done = subprocess.run(command, env=environment, cwd=folder.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = torch.load(folder / "result.pt")
    assert result["module"].startswith("transformers_modules.")
    torch.testing.assert_close(result["logits"], model(ids, attention_mask=mask).logits)
    assert torch.equal(result["generated"], model.generate(ids, attention_mask=mask, num_beams=2, **options))


_WITHOUT_MOERGE = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "moerge":
            raise ModuleNotFoundError("moerge is not installed")
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
case = torch.load(folder + "/case.pt")
with torch.no_grad():
    logits = model(case["ids"], attention_mask=case["mask"]).logits
generated = model.generate(case["ids"], attention_mask=case["mask"], num_beams=2, **case["options"])
model.save_pretrained(folder + "/again")
again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
relative = AutoModelForCausalLM.from_pretrained(os.path.basename(folder), trust_remote_code=True)
for other in (again, relative):
    with torch.no_grad():
        torch.testing.assert_close(other(case["ids"], attention_mask=case["mask"]).logits, logits)
    assert torch.equal(other.generate(case["ids"], attention_mask=case["mask"], num_beams=2, **case["options"]), generated)
torch.save({"logits": logits, "generated": generated, "module": type(model).__module__}, folder + "/result.pt")
"""
