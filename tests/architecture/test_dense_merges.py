"""Dense merges of every family, end to end with the command: the result loads, and is the mean of its experts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import moerge, refuses
from tests.helpers.hf_models import FAMILIES, load, logits, random_model, read_config, save, torch, transformers
from tests.helpers.tiny import edit_config, read_tensors, read_values, write_checkpoint, write_recipe


def write_experts(folder: Path, config: Any) -> dict[str, Any]:
    """Two checkpoints, `math` and `code`, and their models."""
    models = {name: random_model(config, seed) for seed, name in enumerate(("math", "code"))}
    for name, model in models.items():
        save(model, folder / name)
    return models


def average(models: dict[str, Any]) -> Any:
    """A model whose parameters are the means of those of two."""
    first, second = models.values()
    other = second.state_dict()
    first.load_state_dict({name: (tensor + other[name]) / 2 for name, tensor in first.state_dict().items()})
    return first


@pytest.mark.parametrize("name", FAMILIES)
def test_the_average_is_the_mean_of_the_experts(name: str, tmp_path: Path) -> None:
    models = write_experts(tmp_path, FAMILIES[name]())
    mixture = re.search(r"experts|router", "".join(read_tensors(tmp_path / "math")))
    routers = {"routers": {"kind": "average"}} if mixture else {}
    recipe = write_recipe(tmp_path, base=None, experts=("math", "code"), **routers)
    result = moerge("merge", recipe, tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (0, "")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(average(models)), atol=1e-5, rtol=0)
    assert moerge("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_inspect_shows_roles_and_what_has_none(name: str, tmp_path: Path) -> None:
    save(random_model(FAMILIES[name](), 0), tmp_path / "model")
    found = moerge("inspect", tmp_path / "model", "--json").json
    assert (found["family"], found["layers"], found["hidden_size"], found["tokens"]) == (name, 2, 32, 64)
    roles = {role["role"]: role for role in found["roles"]}
    assert {"embedding", "norm.final"} <= set(roles)
    assert roles["layers.*.attention.o"]["tensors"] == 2
    assert sum(role["parameters"] for role in roles.values()) == found["parameters"]
    without = [role for role in roles if role.startswith("(")]
    if name in ("gemma3", "qwen2_vl"):
        assert without and all(re.match(r"\(no role\) (vision_tower|multi_modal_projector|visual)\.", role) for role in without)
    else:
        assert without == []
    text = moerge("inspect", tmp_path / "model").out
    assert all(role[:30] in text for role in roles if "." not in role[30:])


def test_inspect_names_buffers_and_strangers(tmp_path: Path) -> None:
    import numpy as np

    folder = save(random_model(FAMILIES["gpt2"](), 0), tmp_path / "model")
    extra = {"transformer.h.0.attn.bias": np.ones((1, 1, 4, 4), bool), "transformer.h.0.adapter.w": np.zeros(3, np.float32)}
    write_checkpoint(folder, {**read_values(folder), **extra}, read_config(folder), dtype="F32")
    roles = [role["role"] for role in moerge("inspect", folder, "--json").json["roles"]]
    assert roles[-2:] == ["(no role) transformer.h.*.adapter.w", "(buffer) transformer.h.*.attn.bias"]


def test_overrides_by_the_roles_of_fused_and_other_families(tmp_path: Path) -> None:
    """One method for each role: the operations in the plan say which tensors it got."""
    given = {
        "phi3": {"attention.qkv": 1, "ffn.gate_up": 1, "norm": 2, "norm.final": 0},
        "olmo2": {"norm.post_attention": 1, "attention.q_norm": 1},
        "gpt2": {"embedding.position": None, "norm.ffn": 2},
        "qwen2_moe": {"ffn.1": 3, "ffn.shared": 3, "router": 1, "ffn.shared_gate": 1},
        "granitemoe": {"ffn.gate_up": 1, "router": 1},
    }
    for name, overrides in given.items():
        write_experts(tmp_path / name, FAMILIES[name]())
        for match, a_layer in overrides.items():
            merge = {"method": "linear", "overrides": [{"match": match, "method": "average"}]}
            planned = moerge(
                "plan", write_recipe(tmp_path / name, base=None, experts=("math", "code"), merge=merge), "--json"
            ).json
            outside = 1 if a_layer is None or match == "norm" or not a_layer else 0
            assert planned["operations"]["average"] == 2 * (a_layer or 0) + outside, (name, match)


def test_gpt2_with_and_without_prefix_and_with_buffers(tmp_path: Path) -> None:
    """The Hub's gpt2 has no `transformer.`, a fine-tuned one has; old ones store masks."""
    import numpy as np

    models = write_experts(tmp_path, FAMILIES["gpt2"]())
    bare = {name.removeprefix("transformer."): value for name, value in read_values(tmp_path / "math").items()}
    mask = {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.float32)) for layer in range(2)}
    write_checkpoint(tmp_path / "math", {**bare, **mask}, read_config(tmp_path / "math"), dtype="F32")
    result = moerge("merge", write_recipe(tmp_path, base=None, experts=("math", "code")), tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert all(name.startswith("transformer.") for name in read_tensors(tmp_path / "out"))
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(average(models)), atol=1e-5, rtol=0)
    assert moerge("verify", tmp_path / "math").code == 0


def test_a_tensor_under_two_names(tmp_path: Path) -> None:
    write_experts(tmp_path, FAMILIES["gpt2"]())
    values = read_values(tmp_path / "math")
    write_checkpoint(
        tmp_path / "math", {**values, "wte.weight": values["transformer.wte.weight"]}, read_config(tmp_path / "math")
    )
    recipe = write_recipe(tmp_path, base=None, experts=("math", "code"))
    refuses(recipe, tmp_path / "out", "math: tensors", "'wte.weight'", "'transformer.wte.weight'", "are the same: remove one")


def test_gemma3_under_the_names_of_other_versions(tmp_path: Path) -> None:
    models = write_experts(tmp_path, FAMILIES["gemma3"]())
    renamed = {}
    for name, value in read_values(tmp_path / "math").items():
        renamed["model." + name.replace("language_model.model.", "language_model.")] = value
    assert "model.vision_tower.post_layernorm.bias" in renamed and "model.language_model.norm.weight" in renamed
    write_checkpoint(tmp_path / "math", renamed, read_config(tmp_path / "math"), dtype="F32")
    result = moerge("merge", write_recipe(tmp_path, base=None, experts=("math", "code")), tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (0, "")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(average(models)), atol=1e-5, rtol=0)


def test_gemma3_whose_config_says_little(tmp_path: Path) -> None:
    """As on the Hub: the text config has only what differs from transformers' defaults, some of which are sizes."""
    from moerge.architecture import expected_tensors, family_of
    from moerge.architecture.config import normalized_config

    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "model_type": "gemma3_text"}
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}}
    family = family_of(config)
    assert family is not None
    shapes = {tensor.role: tensor.shape for tensor in expected_tensors(family, normalized_config(config, family))}
    assert shapes["embedding"] == (262208, 2560)
    assert (shapes["layers.33.attention.q"], shapes["layers.33.attention.k"]) == ((2048, 2560), (1024, 2560))


def test_a_family_that_nobody_knows_is_merged_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, which has its own names for everything, for a moerge without transformers."""
    models = write_experts(tmp_path, transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    monkeypatch.setattr("moerge.architecture.registry.derived_family", lambda config: None)
    result = moerge("merge", write_recipe(tmp_path, base=None, experts=("math", "code")), tmp_path / "out", "--quiet")
    assert result.code == 0
    assert result.err.startswith("warning: unknown model type 'bloom': merged by tensor name, without roles")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(average(models)), atol=1e-5, rtol=0)
    found = moerge("inspect", tmp_path / "out", "--json").json
    assert found["family"] is None and all(role["role"].startswith("(no role) ") for role in found["roles"])


FUSED = ["mixtral", "qwen3_moe", "granitemoe"]


@pytest.mark.parametrize("name", FUSED)
def test_a_layout_in_memory_is_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    """mergekit 0.1.5 writes its Mixtral so; the command in the message makes it a checkpoint that merges."""
    models = write_experts(tmp_path, FAMILIES[name]())
    held = {key: value.numpy() for key, value in models["math"].state_dict().items()}
    write_checkpoint(tmp_path / "math", held, read_config(tmp_path / "math"), dtype="F32")
    recipe = write_recipe(tmp_path, base=None, experts=("math", "code"))
    line = refuses(
        recipe, tmp_path / "out", "math: tensor 'model.layers.0.", "experts.gate_up_proj'", "holds all experts of a layer", name
    )
    assert "holds all experts of a layer" in moerge("verify", tmp_path / "math").err
    command = line.partition('python -c "')[2].removesuffix('"')
    exec(command, {})
    recipe = write_recipe(tmp_path, base=None, experts={"math": "math-split", "code": "code"})
    assert moerge("merge", recipe, tmp_path / "out").code == 0
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(average(models)), atol=1e-5, rtol=0)


def test_experts_of_other_numbers_are_refused(tmp_path: Path) -> None:
    write_experts(tmp_path, FAMILIES["qwen3_moe"]())
    save(random_model(FAMILIES["qwen3_moe"](num_experts=4), 0), tmp_path / "math")
    recipe = write_recipe(tmp_path, base=None, experts=("math", "code"))
    refuses(recipe, tmp_path / "out", "do not have the same shape: num_local_experts (math: 4, code: 3)")


def test_other_settings_of_routing_are_named(tmp_path: Path) -> None:
    write_experts(tmp_path, FAMILIES["qwen2_moe"]())
    edit_config(tmp_path / "math", norm_topk_prob=True)
    recipe = write_recipe(tmp_path, base=None, experts=("math", "code"))
    refuses(recipe, tmp_path / "out", "norm_topk_prob (math: True, code: False)", "'config: math'")
