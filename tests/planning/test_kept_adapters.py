"""LoRA experts that stay adapters in a sequence-routed model: the files, what is refused, and what the model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moerge
from moerge.errors import InputError
from moerge.modeling import register
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.command import moerge as run
from tests.helpers.tiny import make_models, read_tensors, read_values, write_recipe

pytestmark = pytest.mark.slow

FFN = {"mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24)}
ATTENTION = {"self_attn.q_proj": (16, 16), "self_attn.v_proj": (8, 16)}
EXPERTS = {"math": "math", "code": "code", "knowledge": "knowledge"}
KEPT: dict[str, Any] = {"format": "moerge", "separate": ["ffn", "attention"], "adapters": "keep"}
IDS = torch.arange(3, 25)[None]


def factors(
    modules: dict[str, tuple[int, int]], rank: int, layers: tuple[int, ...] = (0, 1), seed: int = 0
) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for layer in layers:
        for module, shape in modules.items():
            found |= low_rank(f"model.layers.{layer}.{module}", shape, rank=rank, seed=seed)
    return found


def make_adapters(folder: Path, dtype: str = "F32") -> None:
    """A base and three adapters of different ranks, scales, modules and layers: LoRA, rsLoRA, and one with a rank pattern."""
    make_models(folder, experts=[], dtype=dtype)
    write_adapter(folder / "math", factors(FFN, 4), dtype=dtype, r=4, lora_alpha=8)
    write_adapter(folder / "code", factors(ATTENTION, 3, seed=1), dtype=dtype, r=3, lora_alpha=6, use_rslora=True)
    mixed = factors({"mlp.up_proj": (24, 16)}, 2, seed=2) | factors({"self_attn.o_proj": (16, 16)}, 5, (1,), seed=2)
    write_adapter(folder / "knowledge", mixed, dtype=dtype, r=2, lora_alpha=4, rank_pattern={"o_proj": 5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`kept` with adapters and `full` with copies of the same experts; the base is an expert of both."""
    found = tmp_path_factory.mktemp("kept")
    make_adapters(found)
    for name, adapters in (("kept", "keep"), ("full", "merge")):
        recipe = write_recipe(
            found, f"{name}.yaml", experts=EXPERTS, moe={**KEPT, "adapters": adapters}, merge={"method": "average"}
        )
        moerge.merge(recipe, found / name, threads=1)
    return found


@pytest.fixture(scope="module")
def models(folder: Path) -> tuple[Any, Any]:
    register()
    kept, full = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("kept", "full"))
    return kept, full


@pytest.mark.parametrize("expert", ["base", *EXPERTS])
def test_an_expert_is_the_merged_adapter(models: tuple[Any, Any], expert: str) -> None:
    for model in models:
        model.set_routing("fixed", expert=expert)
    kept, full = (model(IDS).logits for model in models)
    torch.testing.assert_close(kept, full, rtol=0, atol=2e-6)
    if expert == "base":
        assert torch.equal(kept, full)


@pytest.mark.parametrize("kind", ["perplexity", "task_vector", "random", "uniform"])
@pytest.mark.parametrize("mix", ["layer", "output", "logits"])
def test_every_routing_and_mix(models: tuple[Any, Any], kind: str, mix: str) -> None:
    batch = torch.stack([IDS[0], IDS[0].flip(0)])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    kept, full = models
    for model in models:
        model.config.mix = mix
        model.set_routing(kind)
    mine, theirs = (model.route(batch, mask) for model in models)
    torch.testing.assert_close(mine.scores, theirs.scores, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(kept(batch, mask).logits[1], full(batch, mask).logits[1], rtol=0, atol=2e-6)
    generated = [model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False) for model in models]
    assert torch.equal(*generated)
    assert torch.equal(
        generated[0], kept.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
    )
    for model in models:
        model.config.mix = "layer"


def test_the_base_is_stored_once_and_factors_are_the_adapters_bytes(folder: Path) -> None:
    base, kept = read_tensors(folder / "base"), read_tensors(folder / "kept")
    adapter = read_tensors(folder / "math")
    for layer in (0, 1):
        for module in (*FFN, *ATTENTION):
            block, name = module.split(".")
            np.testing.assert_array_equal(
                kept[f"model.layers.{layer}.{block}.0.{name}.weight"], base[f"model.layers.{layer}.{module}.weight"]
            )
        for module in FFN:
            block, name = module.split(".")
            for factor in "AB":
                np.testing.assert_array_equal(
                    kept[f"model.layers.{layer}.{block}.0.{name}.adapters.1.{factor}"],
                    adapter[f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight"],
                )
    config = json.loads((folder / "kept" / "config.json").read_text())
    assert config["adapters"] == {
        "math": [{"rank": 4, "scale": 2.0, "modules": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]}],
        "code": [{"rank": 3, "scale": 6 / 3**0.5, "modules": ["self_attn.q_proj", "self_attn.v_proj"]}],
        "knowledge": [
            {"rank": 2, "scale": 2.0, "modules": ["mlp.up_proj"]},
            {"rank": 5, "scale": 0.8, "modules": ["self_attn.o_proj"], "layers": [1]},
        ],
    }


def test_the_file_is_the_base_and_small_factors(folder: Path) -> None:
    sizes = {name: sum(v.nbytes for v in read_tensors(folder / name).values()) for name in ("base", "kept", "full")}
    adapters = sum(v.nbytes for e in EXPERTS for v in read_tensors(folder / e).values())
    separate = sum(v.nbytes for name, v in read_tensors(folder / "base").items() if "mlp" in name or "self_attn" in name)
    assert sizes["kept"] == sizes["base"] + adapters
    assert sizes["full"] == sizes["base"] + 3 * separate
    plan = moerge.plan(folder / "kept.yaml")
    assert plan.output_bytes == sizes["kept"]
    assert f"{adapters / 1e6:,.3g} MB beside the base, where full experts take {3 * separate / 1e6:,.3g} MB" in plan.notes[0]


def test_the_commands(folder: Path, tmp_path: Path) -> None:
    assert moerge_ok("verify", folder / "kept").startswith("47 tensors")
    roles = {role["role"]: role for role in run("inspect", folder / "kept", "--json").json["roles"]}
    assert roles["layers.*.ffn.*.up.A"]["tensors"] == 4 and roles["layers.*.attention.*.o.B"]["parameters"] == 16 * 5
    assert roles["layers.*.ffn.up"]["tensors"] == 2
    (tmp_path / "math.txt").write_text("w5 w6 w7 w8 w9")
    moerge_ok("route", folder / "kept", "--text", f"math={tmp_path / 'math.txt'}")
    moerge_ok("generate", folder / "kept", "--prompt", "w5 w6", "--max-new-tokens", 2)
    card = (folder / "kept" / "README.md").read_text()
    assert "Experts are LoRA adapters on one copy of the base" in card


def moerge_ok(*arguments: Any) -> str:
    result = run(*arguments)
    assert result.code == 0, result
    return result.out


def test_shared_roles_are_merged_from_the_adapted_models(folder: Path, tmp_path: Path) -> None:
    """With attention shared, what adapters do to it is averaged as ever; the feed-forward factors stay."""
    make_adapters(tmp_path)
    recipe = write_recipe(tmp_path, experts=EXPERTS, moe={**KEPT, "separate": ["ffn"]}, merge={"method": "average"})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    found = read_values(tmp_path / "out")
    assert not any("self_attn" in name and "adapters" in name for name in found)
    full = read_values(folder / "full")
    name = "model.layers.0.self_attn.{}.q_proj.weight"
    np.testing.assert_allclose(found[name.format(0)], np.mean([full[name.format(e)] for e in range(4)], axis=0), atol=1e-6)
    register()
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(model.model.layers[0].mlp) == len(model.model.layers[0].self_attn) == 1
    model.set_routing("uniform")
    torch.testing.assert_close(model(IDS).logits, model(IDS, use_cache=False).logits)


def test_without_moerge_the_checkpoints_own_code_runs_it(folder: Path) -> None:
    assert {"adapters_moerge.py", "lowrank_moerge.py"} <= {path.name for path in (folder / "kept").iterdir()}


def test_bfloat16_factors(tmp_path: Path) -> None:
    make_adapters(tmp_path, dtype="BF16")
    moerge.merge(write_recipe(tmp_path, experts=EXPERTS, moe=KEPT), tmp_path / "out", threads=1)
    assert {str(value.dtype) for value in read_tensors(tmp_path / "out").values()} == {"uint16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"separate": ["ffn", "norm"]},
            "moe.separate[1]: only ffn and attention can be kept as adapters, not 'norm': remove it, or",
        ),
        ({"format": "auto", "separate": ["ffn"]}, "moe.adapters is for models that route whole sequences: use 'format: moerge'"),
        ({"adapters": "maybe"}, "moe.adapters"),
    ],
)
def test_recipes_that_ask_for_too_much(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        moerge.plan(write_recipe(folder, "bad.yaml", experts=EXPERTS, moe={**KEPT, **changes}))
    assert message in str(error.value)


def test_experts_that__kept(tmp_path: Path) -> None:
    make_models(tmp_path, experts=["model"], dtype="F32")
    name, shape = "model.layers.0.mlp.up_proj", (24, 16)
    lora, magnitude = low_rank(name, shape, rank=2), {f"{name}.lora_magnitude_vector": np.ones(24, np.float32)}
    write_adapter(tmp_path / "dora", lora | magnitude, r=2, use_dora=True)
    stored = {"model.layers.1.mlp.up_proj.modules_to_save.weight": np.ones(shape, np.float32)}
    write_adapter(tmp_path / "whole", lora | stored, r=2)
    write_adapter(tmp_path / "plain", lora, r=2)
    problems = {
        "model": "model is a full model, and only adapters on the base can be kept: extract one with `moerge extract`",
        "dora": f"dora is a DoRA on '{name}.weight', which cannot be kept as a low-rank adapter: leave out 'moe.adapters'",
        "whole": "whole stores a whole 'model.layers.1.mlp.up_proj.weight', which cannot be kept as a low-rank adapter",
    }
    for expert, message in problems.items():
        with pytest.raises(InputError) as error:
            moerge.plan(write_recipe(tmp_path, experts={expert: expert, "plain": "plain"}, moe=KEPT))
        assert message in str(error.value)
    with pytest.raises(InputError, match="needs a 'base'"):
        moerge.plan(write_recipe(tmp_path, base=None, experts={"a": "plain", "b": "plain"}, moe=KEPT))


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ([], "adapters should be a mapping"),
        ({"nobody": []}, "adapters of 'nobody': the experts are"),
        ({"math": {"rank": 2, "scale": 1.0, "modules": ["mlp.up_proj"]}}, "adapters of 'math' should be a list of groups"),
        ({"math": [{"rank": 2, "scale": 1.0}]}, "a group has rank, scale, modules, layers"),
        ({"math": [{"rank": 0, "scale": 1.0, "modules": []}]}, "rank should be a whole number of at least 1"),
        ({"math": [{"rank": 1, "scale": 1.0, "modules": "mlp"}]}, "modules should be a list"),
        ({"math": [{"rank": 1, "scale": 1.0, "modules": ["input_layernorm"]}]}, "'input_layernorm' is shared"),
        ({"math": [{"rank": 1, "scale": 1.0, "modules": ["mlp.up_proj"], "layers": [2]}]}, "numbers from 0 to 1"),
        ({"math": 2 * [{"rank": 1, "scale": 1.0, "modules": ["mlp.up_proj"]}]}, "'mlp.up_proj' of layer 0 twice"),
        ({"math": [{"rank": 1, "scale": 1.0, "modules": ["mlp.act_fn"]}]}, "'mlp.act_fn', which is no linear layer of LlamaMLP"),
    ],
)
def test_configurations_that_make_no_sense(folder: Path, adapters: Any, message: str) -> None:
    from moerge.modeling import MoergeConfig, MoergeForCausalLM

    config = json.loads((folder / "kept" / "config.json").read_text())
    known = {key: config[key] for key in ("expert_config", "expert_names", "separate")}
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        MoergeForCausalLM(MoergeConfig(**known, adapters=adapters))
