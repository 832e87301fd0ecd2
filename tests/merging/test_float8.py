"""`dtype: float8` writes what transformers' own quantiser makes of the merge in bfloat16, and transformers loads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import edit_config, make_models, write_recipe

torch = pytest.importorskip("torch", reason="needs moerge[models]")
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize  # noqa: E402
from transformers.utils.quantization_config import FineGrainedFP8Config  # noqa: E402

WIDE = {"hidden_size": 128, "intermediate_size": 384}
"""Queries, outputs and feed-forward matrices are multiples of a block; keys and values, of 64 rows, are not."""
QUANTISED = ("q_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight", "down_proj.weight", "w1.weight")


def quantised(tensors: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    quantizer = Fp8Quantize(type("Quantizer", (), {"quantization_config": FineGrainedFP8Config()}))
    expected: dict[str, Any] = {}
    for name, value in tensors.items():
        expected |= quantizer.convert({name: value}) if name.endswith(names) else {name: value}
    return expected


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value.float(), other[name].float()), name


@pytest.fixture
def models(tmp_path: Path) -> Path:
    make_models(tmp_path, experts=["a", "b"], config=WIDE)
    return tmp_path


def merged(folder: Path, out: str, *options: object, **sections: Any) -> Path:
    recipe = write_recipe(folder, experts=["a", "b"], **sections)
    result = moerge("merge", recipe, folder / out, "--quiet", *options)
    assert result.code == 0, result.err
    return folder / out


@pytest.mark.filterwarnings("ignore")
def test_a_dense_merge(models: Path) -> None:
    plain = load_file(merged(models, "plain", merge={"method": "ties", "density": 0.7}) / "model.safetensors")
    out = merged(models, "out", merge={"method": "ties", "density": 0.7}, dtype="float8")
    stored = load_file(out / "model.safetensors")
    same(stored, quantised(plain, QUANTISED))
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    left = set(settings["modules_to_not_convert"])
    assert {"lm_head", "model.layers.0.self_attn.k_proj"} <= left and "model.layers.0.self_attn.q_proj" not in left
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for name, value in loaded.items():
        scale = stored.get(f"{name}_scale_inv")
        expected = stored[name] if scale is None else Fp8Dequantize(None)._dequantize_one(stored[name], scale, torch.bfloat16)
        assert torch.equal(value, expected), name
    assert moerge("verify", out).code == 0


def test_a_mixture(models: Path) -> None:
    moe = {"separate": ["ffn"], "include_base": False, "router": {"kind": "random"}}
    plain = load_file(merged(models, "plain", merge={"method": "average"}, moe=moe) / "model.safetensors")
    out = merged(models, "out", merge={"method": "average"}, moe=moe, dtype="float8")
    same(
        load_file(out / "model.safetensors"),
        quantised(plain, ("q_proj.weight", "o_proj.weight", *(f"w{i}.weight" for i in (1, 2, 3)))),
    )
    left = json.loads((out / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.0.block_sparse_moe.gate" in left and not any("experts" in name for name in left)


def test_bytes_depend_on_neither_threads_nor_windows(models: Path) -> None:
    one = merged(models, "one", "--threads", 1, merge={"method": "average"}, dtype="float8")
    three = merged(models, "three", "--threads", 3, merge={"method": "average"}, dtype="float8")
    assert (one / "model.safetensors").read_bytes() == (three / "model.safetensors").read_bytes()


def test_the_result_is_an_input_again(models: Path) -> None:
    out = merged(models, "out", merge={"method": "average"}, dtype="float8")
    recipe = write_recipe(models, "again.yaml", base="out", experts={"a": "a"}, merge={"method": "average"})
    result = moerge("plan", recipe, "--json")
    assert result.code == 0 and any("base: 10 quantised tensors" in note for note in result.json["notes"]), result
    assert out.is_dir()


@pytest.mark.parametrize(
    ("config", "sections", "parts"),
    [
        ({}, {}, ["dtype float8", "multiples of 128"]),
        ({"model_type": "novel"}, {}, ["dtype float8", "a family that moerge knows"]),
        (WIDE, {"moe": {"format": "moerge", "router": {"kind": "uniform"}}}, ["dtype float8", "transformers' own formats"]),
    ],
)
def test_results_that_cannot_be_float8(tmp_path: Path, config: dict[str, Any], sections: Any, parts: list[str]) -> None:
    folders = make_models(tmp_path, experts=["a", "b"], config={key: config[key] for key in config if key in WIDE})
    for folder in folders.values():
        edit_config(folder, **config)
    recipe = write_recipe(tmp_path, experts=["a", "b"], merge={"method": "average"}, dtype="float8", **sections)
    refuses(recipe, tmp_path / "out", *parts)
    assert moerge("merge", recipe, tmp_path / "out", "--allow-nonfinite").code == 2
