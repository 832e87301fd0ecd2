"""Dense merges of mixtures whose tables transformers says: the logits of the averaged model, in the files' own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from tests.helpers.hf_models import GROUPED, load, logits, random_model, read_config, save, torch, transformers
from tests.helpers.tiny import read_tensors, read_values, write_checkpoint, write_recipe

pytestmark = pytest.mark.slow

_LINEAR = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 8, "value_head_dim": 8}
_QWEN = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    **{f"linear_{key}": value for key, value in _LINEAR.items()},
}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
CASES: dict[str, dict[str, Any]] = {
    "qwen3_5_moe_text": _QWEN,
    "qwen3_next": _QWEN,
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe": {**_ROUTED, "head_dim": 8, "first_k_dense_replace": 1},
    "deepseek_v3": {**_ROUTED, **_MLA, "first_k_dense_replace": 1, "num_key_value_heads": 4},
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 8},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 64,
        "sliding_window": 5,
    },
    "lfm2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
        "use_expert_bias": True,
    },
}
BIASES = dict.fromkeys(("glm4_moe", "deepseek_v3", "minimax_m2"), "e_score_correction_bias") | {"lfm2_moe": "expert_bias"}


def make(family: str) -> Any:
    return transformers.AutoConfig.for_model(family, **{**GROUPED, **CASES[family]})


def write_models(folder: Path, family: str) -> dict[str, Any]:
    base = random_model(make(family), 0)
    models = {"base": base, **{name: random_model(base.config, seed, near=base) for seed, name in ((1, "math"), (2, "code"))}}
    for name, model in models.items():
        save(model, folder / name)
    return models


@pytest.mark.parametrize("family", CASES)
def test_an_average_has_the_logits_of_averaged_modules(family: str, tmp_path: Path) -> None:
    models = write_models(tmp_path, family)
    moerge.merge(write_recipe(tmp_path, base=None, experts=("math", "code")), tmp_path / "out")
    mean, math, code = (models[name] for name in ("base", "math", "code"))
    halves = zip(math.state_dict().items(), code.state_dict().values(), strict=True)
    mean.load_state_dict({name: ((one.double() + other.double()) / 2).to(one.dtype) for (name, one), other in halves})
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(mean), atol=1e-6, rtol=0)
    assert sorted(read_values(tmp_path / "out")) == sorted(read_values(tmp_path / "math"))
    assert moerge.verify(tmp_path / "out").problems == ()
    roles = [role.role for role in moerge.inspect(tmp_path / "out").roles]
    assert not [role for role in roles if role.startswith("(")] and any("router" in role for role in roles)


@pytest.mark.parametrize("method", ["ties", "dare", "della"])
@pytest.mark.parametrize("family", BIASES)
def test_correction_biases_are_averaged_in_their_own_width(family: str, method: str, tmp_path: Path) -> None:
    """They are counted, not learned: no sign is elected, nothing is dropped or rescaled; an override may say otherwise."""
    write_models(tmp_path, family)
    for name in ("base", "math", "code"):
        values = read_values(tmp_path / name)
        kinds = {tensor: "F32" if tensor.endswith(BIASES[family]) else "BF16" for tensor in values}
        write_checkpoint(tmp_path / name, values, read_config(tmp_path / name), dtype=kinds.__getitem__)
    recipe = write_recipe(tmp_path, experts=("math", "code"), merge={"method": method, "density": 0.5})
    moerge.merge(recipe, tmp_path / "out")
    stored, math, code = (read_values(tmp_path / name) for name in ("out", "math", "code"))
    biases = [name for name in stored if name.endswith(BIASES[family])]
    assert biases
    for name in biases:
        np.testing.assert_allclose(stored[name], (math[name].astype(np.float64) + code[name]) / 2, rtol=1e-6)
        assert read_tensors(tmp_path / "out")[name].dtype.itemsize == 4
    chosen = {"match": f"*{BIASES[family]}", "method": "passthrough", "model": "math"}
    merge = {"method": method, "density": 0.5, "overrides": [chosen]}
    moerge.merge(write_recipe(tmp_path, experts=("math", "code"), merge=merge), tmp_path / "chosen")
    for name in biases:
        np.testing.assert_array_equal(read_values(tmp_path / "chosen")[name], math[name])
