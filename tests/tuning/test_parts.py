"""Which parameters belong to what, family by family, on models without values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from moerge.modeling import MoergeConfig, MoergeForCausalLM, MoergeHeterogeneousConfig, MoergeHeterogeneousForCausalLM
from moerge.tuning.parts import Schedule, parts_of

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 8,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


def skeleton(family: str) -> Any:
    auto: Any = AutoModelForCausalLM
    with torch.device("meta"):
        return auto.from_config(AutoConfig.for_model(family, **SIZES))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe"])
def test_native_mixtures(family: str) -> None:
    model = skeleton(family)
    parts = parts_of(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert sum(sizes[name] for name in parts["router"]) == 2 * 4 * 16
    assert sum(sizes[name] for name in parts["experts"]) == 2 * 4 * 3 * 16 * 24
    assert not parts["projectors"]
    assert parts["router"] | parts["experts"] | parts["backbone"] == parts["all"] == sizes.keys()
    assert sum(len(parts[part]) for part in ("router", "experts", "backbone")) == len(parts["all"])
    assert {name for name in sizes if "shared_expert" in name} <= parts["backbone"]


def test_a_dense_model_is_backbone() -> None:
    parts = parts_of(skeleton("llama"))
    assert parts["backbone"] == parts["all"] and not parts["router"] and not parts["experts"]


def test_a_mixture_routed_by_sequence() -> None:
    dense = AutoConfig.for_model("llama", **SIZES)
    config = MoergeConfig(
        expert_config=dense, expert_names=["a", "b"], separate=["ffn", "attention"], routing={"kind": "learned"}
    )
    with torch.device("meta"):
        parts = parts_of(MoergeForCausalLM(config))
    assert parts["router"] == {"router.weight"}
    assert all(".mlp." in name or ".self_attn." in name for name in parts["experts"])
    assert len(parts["experts"]) == 2 * 2 * 7
    assert parts["backbone"] == parts["all"] - parts["experts"] - parts["router"]


@pytest.mark.parametrize("embedding", ["shared", "separate"])
def test_a_mixture_of_whole_models(embedding: str) -> None:
    """One of them a native mixture: its own routers belong to it, and are no router of this model."""
    configs = [AutoConfig.for_model("mixtral", **SIZES), AutoConfig.for_model("llama", **SIZES)]
    config = MoergeHeterogeneousConfig(
        expert_configs=configs,
        expert_names=["a", "b"],
        vocab_size=64,
        hidden_size=16,
        embedding=embedding,
        projectors={"linear": True, "width": 8} if embedding == "shared" else None,
        routing={"kind": "learned"},
    )
    with torch.device("meta"):
        parts = parts_of(MoergeHeterogeneousForCausalLM(config))
    shared = {"model.embed_tokens.weight", "lm_head.weight"} if embedding == "shared" else set()
    assert parts["router"] == {"router.weight"} and parts["backbone"] == shared
    assert len(parts["projectors"]) == (2 * 2 * 6 if shared else 0)
    assert all(name.startswith(("model.projectors_in.", "model.projectors_out.")) for name in parts["projectors"])
    for number, name in enumerate("ab"):
        assert parts[f"experts.{name}"] == {name for name in parts["all"] if name.startswith(f"model.experts.{number}.")}
    assert parts["experts"] == parts["experts.a"] | parts["experts.b"]
    assert any(".gate." in name for name in parts["experts.a"])
    assert parts["router"] | parts["projectors"] | parts["experts"] | parts["backbone"] == parts["all"]


def test_a_schedule_opens_and_never_closes() -> None:
    schedule = Schedule(((0, frozenset("a")), (3, frozenset("bc")), (5, frozenset("d"))))
    assert schedule.ever_trained == frozenset("abcd")
    assert [sorted(schedule.frozen(step)) for step in (0, 2, 3, 4, 5, 9)] == [
        ["b", "c", "d"],
        ["b", "c", "d"],
        ["d"],
        ["d"],
        [],
        [],
    ]
