"""The configuration for experts of different architectures: what it takes, what it refuses, what transformers reads from it."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoConfig, GPTNeoXForCausalLM

from moerge.modeling import MoergeHeterogeneousConfig, MoergeHeterogeneousForCausalLM
from tests.modeling.mixed_models import CONFIGS, config_of, expert, mixed

PROJECTORS = {"linear": True, "width": 6}


def config(**changes: Any) -> MoergeHeterogeneousConfig:
    values = config_of([expert("llama"), expert("gpt_neox")], "shared")
    return MoergeHeterogeneousConfig(**{**values, **changes})


def experts(model_type: str, **values: Any) -> dict[str, Any]:
    return {"expert_configs": [CONFIGS["llama"] | {"model_type": "llama"}, {"model_type": model_type, **values}]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_names": ["a", "a"]}, "expert_names should be one or more different names, not ['a', 'a']"),
        ({"expert_names": ["a"]}, "expert_configs should be a list of 1 configurations, one for each expert name"),
        ({"expert_configs": None}, "expert_configs should be a list of 2 configurations, one for each expert name"),
        (
            {"expert_configs": [{"hidden_size": 4}, {}]},
            "expert_configs should be the configurations of the experts, each with its model_type",
        ),
        (
            experts("deep_thought", auto_map={"AutoConfig": "configuration.Config"}),
            "expert 'code' is of type 'deep_thought', which this transformers has no language model for; "
            "code that comes with a checkpoint is never run",
        ),
        (
            experts("t5"),
            "expert 'code' is of type 't5', which this transformers has no language model for; "
            "code that comes with a checkpoint is never run",
        ),
        (experts("bart"), "expert 'code' is of type 'bart' and no decoder-only model: it cannot be an expert"),
        (experts("bert"), "expert 'code' is of type 'bert' and no decoder-only model: it cannot be an expert"),
        (
            experts("gemma3n_text", hidden_size_per_layer_input=8),
            "expert 'code' of type 'gemma3n_text' reads the tokens again in every layer: it cannot be an expert",
        ),
        (
            experts("llama", quantization_config={"quant_method": "gptq", "bits": 4}),
            "an expert of type 'llama' is quantized: experts are needed in full precision",
        ),
        ({"vocab_size": None}, "vocab_size should be a whole number of at least 1, not None"),
        ({"hidden_size": True}, "hidden_size should be a whole number of at least 1, not True"),
        ({"embedding": "both"}, "embedding should be one of shared, separate, not 'both'"),
        ({"projectors": None}, 'projectors should be {"linear": true or false, "width": number}, not None'),
        (
            {"projectors": {"width": 4}},
            'projectors should be {"linear": true or false, "width": number}, not {\'width\': 4}',
        ),
        ({"projectors": {"linear": 1, "width": 4}}, "projectors linear should be true or false, not 1"),
        ({"projectors": {"linear": True, "width": 0}}, "projectors width should be a whole number of at least 1, not 0"),
        (
            {"embedding": "separate"},
            "with separate embeddings there are no projectors and no shared head: leave them out",
        ),
        (
            {"tie_word_embeddings": True},
            "tie_word_embeddings should be false: the shared embedding and head are two tensors",
        ),
        ({"top_k": 2}, "top_k belongs inside `routing`: at the top level transformers takes it for one of sampling"),
        (
            {"routing": {"kind": "task_vector"}},
            "routing kind should be one of perplexity, random, uniform, fixed, learned, not 'task_vector'",
        ),
        (
            {"routing": {"kind": "uniform", "top_k": 1}},
            "routing kind 'uniform' has no option 'top_k'; its options: on, prefix_tokens",
        ),
        ({"routing": {"on": "suffix"}}, "routing on should be one of prefix, sequence, not 'suffix'"),
        ({"routing": {"prefix_tokens": 0}}, "routing prefix_tokens should be a whole number of at least 1, not 0"),
        ({"routing": {"kind": "fixed"}}, "routing to the fixed expert None: the experts are math, code"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
        config(**changes)


@pytest.mark.parametrize(("end", "missing"), [("input", "input embedding"), ("output", "head")])
def test_a_model_without_ends_of_its_own_is_no_expert(end: str, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config()
    monkeypatch.setattr(GPTNeoXForCausalLM, f"get_{end}_embeddings", lambda self: None)
    with pytest.raises(ValueError, match=f"^expert 'code' of type 'gpt_neox' has no {missing} of its own$"):
        MoergeHeterogeneousForCausalLM(made)


def test_tensors_that_an_older_transformers_would_not_find_inside_another_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unscoped:
        pass

    monkeypatch.setattr("moerge.modeling.experts_moerge.WeightTransform", Unscoped)
    mixed("llama", "gpt_neox")  # as stored
    with pytest.raises(ValueError, match=r"^expert 'code' of type 'mixtral' inside another model needs a newer transformers"):
        mixed("llama", "mixtral")


def test_defaults() -> None:
    made = config()
    assert made.routing == {"kind": "perplexity", "top_k": 2, "temperature": 1.0, "on": "prefix", "prefix_tokens": 64}
    assert (made.bos_token_id, made.eos_token_id, made.pad_token_id) == (1, 2, 0)
    assert (made.num_experts, made.vocab_size, made.hidden_size, made.max_position_embeddings) == (2, 64, 32, 64)
    assert made.get_text_config() is made


def test_json_round_trip() -> None:
    for changes in (
        {"routing": {"kind": "fixed", "expert": "code"}},
        {"routing": {"kind": "random", "on": "sequence", "seed": 3}},
        {"embedding": "separate", "projectors": None, "dtype": "bfloat16"},
    ):
        made = config(**changes)
        again = MoergeHeterogeneousConfig(**made.to_diff_dict())
        assert again.to_dict() == made.to_dict()


def test_the_experts_own_configurations_stay_as_they_are() -> None:
    old = {**CONFIGS["llama"], "model_type": "llama", "vocab_size": 51, "rope_theta": 5e5, "rope_scaling": None}
    old |= {"torch_dtype": "float16", "auto_map": {"AutoModelForCausalLM": "evil.Model"}, "_name_or_path": "here"}
    made = config(expert_configs=[old, AutoConfig.for_model("gpt2", **CONFIGS["gpt2"])])
    kept = {key: value for key, value in old.items() if key not in ("torch_dtype", "auto_map", "_name_or_path")}
    assert made.expert_configs[0] == {**kept, "dtype": "float16"}
    assert old["model_type"] == "llama"  # what was passed is left alone
    assert made.expert_config(0).rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    assert made.expert_config(1).model_type == "gpt2" and str(made.dtype) == "torch.float16"
    MoergeHeterogeneousForCausalLM(made)
    assert made.expert_config(0).vocab_size == 51


def test_top_k_of_the_routing_is_not_that_of_sampling() -> None:
    model = mixed("llama", "gpt2", routing={"kind": "perplexity", "top_k": 1, "temperature": 0.3})
    assert (model.generation_config.top_k, model.generation_config.temperature) == (None, None)
