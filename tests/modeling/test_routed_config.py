"""The configuration: what it takes, what it refuses, and what transformers reads from it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import GPT2Config

from moerge.modeling import MoergeConfig
from tests.modeling.routed_models import CONFIGS, NAMES, SIZES, dense_experts, routed


def config(**changes: Any) -> MoergeConfig:
    values: dict[str, Any] = {"expert_config": CONFIGS["llama"](), "expert_names": NAMES}
    return MoergeConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_config": None}, "expert_config should be the configuration of the experts, with its model_type"),
        ({"expert_config": {"hidden_size": 4}}, "expert_config should be the configuration of the experts, with its model_type"),
        (
            {"expert_config": {"model_type": "gemma3_text"}},
            "experts of type 'gemma3_text' cannot be routed by sequence; types that can: llama, mistral, qwen2, qwen3",
        ),
        (
            {"expert_config": GPT2Config()},
            "experts of type 'gpt2' cannot be routed by sequence; types that can: llama, mistral, qwen2, qwen3",
        ),
        ({"expert_names": []}, "expert_names should be one or more different names, not []"),
        ({"expert_names": ["a", "a"]}, "expert_names should be one or more different names, not ['a', 'a']"),
        ({"separate": ["mlp"]}, "separate names 'mlp', which is no role; roles: ffn, attention, norm, embedding, head"),
        ({"mix": "sum"}, "mix should be one of layer, output, logits, not 'sum'"),
        ({"top_k": 2}, "top_k belongs inside `routing`: at the top level transformers takes it for one of sampling"),
        (
            {"routing": {"kind": "ppl"}},
            "routing kind should be one of perplexity, task_vector, random, uniform, fixed, learned, not 'ppl'",
        ),
        (
            {"routing": {"kind": "random", "sed": 1}},
            "routing kind 'random' has no option 'sed'; its options: top_k, temperature, seed",
        ),
        ({"routing": {"kind": "uniform", "top_k": 1}}, "routing kind 'uniform' has no option 'top_k'; it has no options"),
        ({"routing": {"top_k": 0}}, "routing top_k should be a whole number of at least 1, not 0"),
        ({"routing": {"temperature": 0}}, "routing temperature should be a number above 0, not 0"),
        ({"routing": {"kind": "fixed"}}, "routing to the fixed expert None: the experts are base, math, code"),
        (
            {"routing": {"kind": "task_vector"}, "expert_names": ["math", "code"]},
            "task-vector routing needs the base as one of the experts, under the name 'base': the experts are math, code",
        ),
        (
            {"routing": {"kind": "task_vector"}, "separate": []},
            "task-vector routing needs a role that is kept separate: with all shared the experts are equal",
        ),
        (
            {"routing": {"kind": "task_vector", "roles": ["head"]}},
            "task-vector routing over 'head', which is not separate; separate: ffn",
        ),
        (
            {"separate": ["head"], "expert_config": CONFIGS["llama"](tie_word_embeddings=True)},
            "embedding and head are tied: keep both separate or neither",
        ),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        config(**changes)


def test_defaults_are_the_papers() -> None:
    made = config()
    assert (made.separate, made.mix) == (["ffn"], "layer")
    assert made.routing == {"kind": "perplexity", "top_k": 2, "temperature": 1.0}
    assert [made.modules_of(role) for role in ("ffn", "attention")] == [3, 1]


def test_the_experts_own_configuration_shows_through() -> None:
    made = config(expert_config={**CONFIGS["llama"]().to_dict(), "dtype": "bfloat16"})
    for size in ("hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        assert getattr(made, size) == SIZES[size]
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, 2, 0)
    assert str(made.dtype) == "torch.bfloat16" and made.get_text_config() is made
    made.vocab_size = 99
    assert made.expert_config.vocab_size == 99


def test_an_old_configuration_of_the_experts_is_read_too() -> None:
    """config.json as transformers 4 wrote it: rope_theta at the top."""
    old = {**SIZES, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "float16"}
    made = config(expert_config=old)
    assert made.expert_config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    assert str(made.dtype) == "torch.float16"
    assert old["model_type"] == "llama"  # what was passed is left alone


def test_json_round_trip() -> None:
    for routing in (
        {"kind": "task_vector", "layers": [0]},
        {"kind": "fixed", "expert": "code"},
        {"temperature": 0.5, "top_k": 1},
    ):
        made = config(separate=["attention", "ffn"], mix="logits", routing=routing)
        again = MoergeConfig(**made.to_diff_dict())
        assert again.to_dict() == made.to_dict() and again.separate == ["ffn", "attention"]


def test_top_k_of_the_routing_is_not_that_of_sampling() -> None:
    model = routed(dense_experts(), routing={"kind": "perplexity", "top_k": 1, "temperature": 0.3})
    assert (model.generation_config.top_k, model.generation_config.temperature) == (None, None)
