"""Task vectors of mixtures and of models of several parts as LoRA: peft finds every tensor, and merges what was extracted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from moerge.extraction import checking
from moerge.tensors.views.low_rank import read_float32
from tests.helpers.hf_models import FAMILIES, load, random_model, save, torch
from tests.helpers.multimodal import MULTIMODAL
from tests.helpers.tiny import read_values

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")

pytestmark = pytest.mark.filterwarnings("ignore")

MIXTURES = ("mixtral", "qwen3_moe", "granitemoe")


def pair(folder: Path, config: Any, trained: str = "", rank: int = 2) -> tuple[Path, Path]:
    """A base, and an expert whose matrices differ by products of this rank (those with `trained` in their names in memory)."""
    base = save(random_model(config, 1), folder / "base")
    model = load(base)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim >= 2 and trained in name and "embed" not in name and "head" not in name and "conv" not in name:
                left, right = torch.randn(*value.shape[:-1], rank), torch.randn(*value.shape[:-2], rank, value.shape[-1])
                value.add_(0.05 * left @ right)
    return base, save(model, folder / "expert")


def merged_by_peft(base: Path, adapter: Path, out: Path) -> dict[str, np.ndarray]:
    model = peft.PeftModel.from_pretrained(load(base), adapter)
    assert set(peft.get_peft_model_state_dict(model)) == set(locate(str(adapter)).tensors)
    model.merge_and_unload().save_pretrained(out)
    return read_values(out)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_comes_back(tmp_path: Path, name: str) -> None:
    base, expert = pair(tmp_path, FAMILIES[name]())
    result = moerge.extract(str(expert), tmp_path / "adapter", base=str(base), rank=4)  # gate and up are one in memory: twice 2
    assert result.share_of_modules > 1 - 1e-6
    wanted, theirs = read_values(expert), merged_by_peft(base, tmp_path / "adapter", tmp_path / "merged")
    ours = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base)))
    for key, value in wanted.items():
        if "router" in key or key.endswith("mlp.gate.weight") or "block_sparse_moe.gate." in key:
            continue  # left out
        np.testing.assert_allclose(theirs[key], value, atol=2e-4, err_msg=key)
        np.testing.assert_allclose(read_float32(ours.tensors[key]), theirs[key], atol=2e-6, err_msg=key)


@pytest.mark.parametrize("trained", ["gate_up_proj", "down_proj", "layers.1.mlp.experts.down_proj"])
def test_parameters_that_were_not_trained_are_no_targets(tmp_path: Path, trained: str) -> None:
    base, expert = pair(tmp_path, FAMILIES["qwen3_moe"](), trained)
    moerge.extract(str(expert), tmp_path / "adapter", base=str(base), rank=2)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert all(target.endswith(trained.rpartition(".")[2]) for target in config["target_parameters"])
    assert (len(config["target_parameters"]) == 1) and not config["target_modules"]
    wanted, theirs = read_values(expert), merged_by_peft(base, tmp_path / "adapter", tmp_path / "merged")
    for key, value in wanted.items():
        np.testing.assert_allclose(theirs[key], value, atol=2e-4, err_msg=key)


def test_energy_gives_experts_a_common_rank(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, FAMILIES["mixtral"](), "experts")
    result = moerge.extract(str(expert), tmp_path / "adapter", base=str(base), energy=0.7)
    assert all(role.share >= 0.7 for role in result.roles if role.kind == "lora")
    assert result.rank < 4
    theirs, before = merged_by_peft(base, tmp_path / "adapter", tmp_path / "merged"), read_values(base)
    lost = sum(float(((theirs[key] - value).astype(np.float64) ** 2).sum()) for key, value in read_values(expert).items())
    total = sum(float(((before[key] - value).astype(np.float64) ** 2).sum()) for key, value in read_values(expert).items())
    np.testing.assert_allclose(result.share, 1 - lost / total, atol=1e-4)


@pytest.mark.parametrize("name", sorted(MULTIMODAL))
def test_peft_finds_every_module_of_a_model_of_several_parts(tmp_path: Path, name: str) -> None:
    base, expert = pair(tmp_path, MULTIMODAL[name]())
    moerge.extract(str(expert), tmp_path / "adapter", base=str(base), rank=2)
    wanted, theirs = read_values(expert), merged_by_peft(base, tmp_path / "adapter", tmp_path / "merged")
    compared = [key for key in wanted if key.endswith(("q_proj.weight", "down_proj.weight")) and "layers" in key]
    assert compared
    for key in compared:
        np.testing.assert_allclose(theirs[key], wanted[key], atol=2e-4, err_msg=key)


def test_half_of_what_is_one_in_memory_is_refused(tmp_path: Path) -> None:
    base, expert = pair(tmp_path, FAMILIES["mixtral"](), "experts")
    with pytest.raises(InputError, match=r"w1\.weight', and not '.*w3\.weight', which is one with it in memory"):
        moerge.extract(str(expert), tmp_path / "adapter", base=str(base), modules=["*.w1.weight"])


def test_what_peft_would_not_find_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, expert = pair(tmp_path, FAMILIES["mixtral"](), "experts")
    monkeypatch.setattr("moerge.extraction.card._short", lambda targets, modules: ["q_proj"])
    with pytest.raises(InputError, match=r"tensor '.*q_proj\.lora_A\.weight' has a place in peft's model, and is not stored"):
        moerge.extract(str(expert), tmp_path / "adapter", base=str(base))
    assert not (tmp_path / "adapter").exists()


def test_names_that_are_not_pefts(tmp_path: Path) -> None:
    base = save(random_model(FAMILIES["llama"](), 1), tmp_path / "base")
    config = json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}).encode()
    shapes = {"base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight": (2, 32)}
    with pytest.raises(InputError, match=r"k_proj\.lora_A\.weight' has no place in peft's model"):
        checking.check_with_peft(locate(str(base)), config, shapes)


def test_adapters_of_mixtures_are_merged_into_one(tmp_path: Path) -> None:
    base = save(random_model(FAMILIES["qwen3_moe"](), 1), tmp_path / "base")
    for seed, targets in enumerate((["experts.gate_up_proj", "experts.down_proj"], ["experts.down_proj"])):
        settings = peft.LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
        model = peft.get_peft_model(load(base), settings)
        torch.manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.copy_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / f"a{seed}")
    recipe = {
        "base": str(base),
        "experts": {"x": str(tmp_path / "a0"), "y": str(tmp_path / "a1")},
        "merge": {"method": "task_arithmetic", "scale": 1.0},
    }
    moerge.merge_adapters({**recipe, "output": {"kind": "adapter", "rank": 4}}, tmp_path / "both")
    moerge.merge({**recipe, "dtype": "float32"}, tmp_path / "model")
    wanted, theirs = read_values(tmp_path / "model"), merged_by_peft(base, tmp_path / "both", tmp_path / "merged")
    for key, value in wanted.items():
        np.testing.assert_allclose(theirs[key], value, atol=2e-4, err_msg=key)
