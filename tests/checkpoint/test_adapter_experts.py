"""LoRA on parameters that hold all experts of a layer: as peft merges it, and as a sum for each expert in float64."""

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
from moerge.tensors.views.low_rank import read_float32
from tests.helpers.hf_models import FAMILIES, SIZES, load, random_model, save, torch, transformers
from tests.helpers.tiny import read_values, write_json, write_safetensors

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")

pytestmark = pytest.mark.filterwarnings("ignore")

GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def base_of(name: str, folder: Path) -> Path:
    return save(random_model(FAMILIES[name](), 1), folder)


def trained(base: Path, folder: Path, **settings: Any) -> Any:
    """An adapter with random values, saved by peft; the model that it is on."""
    model = peft.get_peft_model(
        load(base), peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], **settings})
    )
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def compare(base: Path, adapter: Path, merged: Path, *, changed: int) -> None:
    found, wanted = apply_adapter(locate(str(adapter)), locate(str(base))), read_values(merged)
    assert found.tensors.keys() == wanted.keys()
    before = read_values(base)
    assert sum(bool((before[key] != wanted[key]).any()) for key in wanted) == changed
    for key, tensor in found.tensors.items():
        np.testing.assert_allclose(read_float32(tensor), wanted[key], rtol=1e-6, atol=2e-6, err_msg=key)


@pytest.mark.parametrize("targets", [[GATE_UP, DOWN], [GATE_UP], [DOWN]], ids=["both", "gate_up", "down"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "granitemoe"])
def test_as_peft_merges_it(tmp_path: Path, name: str, targets: list[str]) -> None:
    base = base_of(name, tmp_path / "base")
    patterns = {"rank_pattern": {"gate_up_proj": 4}, "alpha_pattern": {DOWN: 7}, "use_rslora": len(targets) == 2}
    model = trained(base, tmp_path / "adapter", target_parameters=targets, **patterns)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    experts = 1 if name == "granitemoe" else 3
    pieces = experts * (1 if name == "granitemoe" else 2) * (GATE_UP in targets) + experts * (DOWN in targets)
    compare(base, tmp_path / "adapter", tmp_path / "merged", changed=2 * (1 + pieces))


def test_experts_that_are_inputs_first(tmp_path: Path) -> None:
    """gpt-oss stores [experts, inputs, outputs], and its down_proj is square: the type tells which way round."""
    config = transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 32}, head_dim=8, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2
    )
    base = save(random_model(config, 1), tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_parameters=[GATE_UP, DOWN])
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    compare(base, tmp_path / "adapter", tmp_path / "merged", changed=2 * 3)


def test_all_linear(tmp_path: Path) -> None:
    """peft makes target_parameters of the router and the experts, of twice the rank where two matrices lie in one."""
    base = base_of("mixtral", tmp_path / "base")
    model = trained(base, tmp_path / "adapter", target_modules="all-linear")
    assert "gate.weight" in json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_parameters"]
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    compare(base, tmp_path / "adapter", tmp_path / "merged", changed=2 * (4 + 1 + 3 * 3))


PREFIX = "base_model.model.model.layers.0.mlp.experts."
EXPERTS, RANK = 3, 2


def written(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    whole = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3, "peft_version": "0.21.0", "target_modules": [], **config}
    write_json(folder / "adapter_config.json", {"target_parameters": [DOWN], **whole})
    write_safetensors(
        folder / "adapter_model.safetensors", {PREFIX + name: value for name, value in tensors.items()}, dtype="F32"
    )
    return folder


def factors(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """A [E, K, I] and B [E, O, K]."""
    rng = np.random.default_rng(3)
    return rng.standard_normal((EXPERTS, RANK, inputs), np.float32), rng.standard_normal((EXPERTS, outputs, RANK), np.float32)


def interleaved(b: np.ndarray) -> np.ndarray:
    return b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def blocks(b: np.ndarray) -> np.ndarray:
    return b.transpose(1, 0, 2).reshape(b.shape[1], -1)


LAYOUTS = {
    "interleaved": (lambda a: a.reshape(-1, a.shape[2]), interleaved, None),
    "blocks": (lambda a: a.reshape(-1, a.shape[2]), blocks, "blocks"),
    "of three axes": (lambda a: a, lambda b: b, None),
    "one A for all": (lambda a: a[0], interleaved, None),
    "one A for all, blocks": (lambda a: a[0], blocks, "blocks"),
    "one B for all": (lambda a: a.reshape(-1, a.shape[2]), lambda b: b[0], None),
}


@pytest.mark.parametrize("name", ["qwen3_moe", "granitemoe"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sum_for_each_expert(tmp_path: Path, name: str, layout: str) -> None:
    base = base_of(name, tmp_path / "base")
    width = 20 if name == "qwen3_moe" else 48
    a, b = factors(width, 32)
    pack_a, pack_b, packing = LAYOUTS[layout]
    a = np.broadcast_to(a[:1], a.shape) if "one A" in layout else a
    b = np.broadcast_to(b[:1], b.shape) if "one B" in layout else b
    tensors = {"lora_A.weight": pack_a(a), "lora_B.weight": pack_b(b)}
    folder = written(tmp_path / "adapter", {key: np.ascontiguousarray(value) for key, value in tensors.items()})
    if name == "granitemoe":
        rename(folder, "mlp", "block_sparse_moe")
    found = apply_adapter(locate(str(folder)), locate(str(base)), packing)
    before = read_values(base)
    for expert in range(EXPERTS):
        change = 1.5 * (b[expert].astype(np.float64) @ a[expert].astype(np.float64))
        key = f"model.layers.0.mlp.experts.{expert}.down_proj.weight"
        if name == "granitemoe":
            key = "model.layers.0.block_sparse_moe.output_linear.weight"
            actual, own = read_float32(found.tensors[key])[expert], before[key][expert]
        else:
            actual, own = read_float32(found.tensors[key]), before[key]
        np.testing.assert_allclose(actual, own + change, rtol=1e-5, atol=1e-6)


def rename(folder: Path, old: str, new: str) -> None:
    tensors = {key.replace(f".{old}.", f".{new}."): value for key, value in read_values(folder).items()}
    write_safetensors(folder / "adapter_model.safetensors", tensors, dtype="F32")


def test_a_recipe_says_how_unsloth_packed(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path / "base")
    a, b = factors(20, 32)
    tensors = {"lora_A.weight": a.reshape(-1, 20), "lora_B.weight": blocks(b)}
    adapter = written(tmp_path / "adapter", tensors, auto_mapping={"unsloth_fixed": True})
    recipe = {"base": str(base), "experts": {"x": str(adapter)}, "merge": {"method": "linear"}}
    with pytest.raises(InputError, match=r"experts\.lora_B\.weight' holds all experts.*packing: blocks"):
        moerge.plan(recipe)
    plans = []
    for packing in ("blocks", "interleaved"):
        recipe["experts"] = {"x": {"model": str(adapter), "packing": packing}}
        plans.append(moerge.plan(recipe))
        moerge.merge(plans[-1], tmp_path / packing)
    assert plans[0].fingerprint != plans[1].fingerprint
    key = "model.layers.0.mlp.experts.1.down_proj.weight"
    wanted = read_values(base)[key] + 1.5 * (b[1] @ a[1])
    np.testing.assert_allclose(read_values(tmp_path / "blocks")[key], wanted, rtol=1e-5, atol=1e-5)
    assert not np.allclose(read_values(tmp_path / "interleaved")[key], wanted, atol=1e-2)
    recipe["experts"] = {"x": {"model": str(base), "packing": "blocks"}}
    with pytest.raises(InputError, match=r"experts\.x\.packing is for adapters"):
        moerge.plan(recipe)


BAD: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, Any], str]] = {
    "another rank": ((6, 20), (32, 6), {"r": 4}, r"down_proj' has rank 2, but adapter_config\.json gives it 4"),
    "another base": ((6, 21), (32, 6), {}, r"layers\.0\.mlp\.experts'.*\[6, 21\], \[32, 6\].*fit none.*down_proj \[3, 32, 20\]"),
    "another number of experts": ((8, 20), (32, 8), {}, "has rank 8"),
    "ranks that differ": ((6, 20), (32, 3), {}, "fit none"),
    "transposed": ((6, 32), (20, 6), {}, "fit none"),
    "a parameter that is no target": ((6, 20), (32, 6), {"target_parameters": [GATE_UP]}, "fit none"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    a, b, config, message = BAD[case]
    base = base_of("qwen3_moe", tmp_path / "base")
    tensors = {"lora_A.weight": np.ones(a, np.float32), "lora_B.weight": np.ones(b, np.float32)}
    adapter = written(tmp_path / "adapter", tensors, **config)
    with pytest.raises(InputError, match=message):
        apply_adapter(locate(str(adapter)), locate(str(base)))


def test_a_square_whose_writer_is_not_known(tmp_path: Path) -> None:
    base = save(random_model(FAMILIES["granitemoe"](intermediate_size=32), 1), tmp_path / "base")
    tensors = {"lora_A.weight": np.ones((6, 32), np.float32), "lora_B.weight": np.ones((32, 6), np.float32)}
    for version, told in (("0.17.1", False), ("", False), ("0.21.0", True)):
        adapter = written(tmp_path / "adapter", tensors, peft_version=version)
        rename(adapter, "mlp", "block_sparse_moe")
        if told:
            apply_adapter(locate(str(adapter)), locate(str(base)))
            continue
        with pytest.raises(InputError, match=r"experts\.lora_B\.weight' may be of a parameter or of its transpose"):
            apply_adapter(locate(str(adapter)), locate(str(base)))


def test_a_merge_does_not_depend_on_threads(tmp_path: Path) -> None:
    base = base_of("granitemoe", tmp_path / "base")
    trained(base, tmp_path / "adapter", target_parameters=[GATE_UP, DOWN])
    recipe = {"base": str(base), "experts": {"x": str(tmp_path / "adapter")}, "merge": {"method": "ties", "density": 0.5}}
    for threads in (1, 3):
        moerge.merge(recipe, tmp_path / f"out-{threads}", threads=threads)
    one, three = (read_values(tmp_path / f"out-{threads}") for threads in (1, 3))
    assert all(np.array_equal(one[key], three[key]) for key in one)
