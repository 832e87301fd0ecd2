"""FP8, MXFP4 and NVFP4 checkpoints are read as transformers and compressed-tensors read them, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.checkpoint.quantised import with_numbers
from moerge.checkpoint.reader import Checkpoint, open_folder
from moerge.errors import InputError
from moerge.tensors.minifloat import E2M1, table_of
from moerge.tensors.tensor import Tensor
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import llama_config, write_json, write_recipe, write_tokenizer

torch = pytest.importorskip("torch", reason="needs moerge[models]")
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize  # noqa: E402
from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: E402
from transformers.utils.quantization_config import FineGrainedFP8Config  # noqa: E402

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def random(seed: int, *shape: int) -> Any:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scales(seed: int, *shape: int) -> Any:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.01


def random_bytes(seed: int, *shape: int, low: int = 0, high: int = 256) -> Any:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def opened(folder: Path, tensors: Mapping[str, Any], **settings: Any) -> Checkpoint:
    """A checkpoint of these tensors, opened and read as numbers; `settings` are its quantization_config."""
    folder.mkdir(exist_ok=True)
    save_file({**tensors, "norm.weight": torch.ones(4, dtype=torch.bfloat16)}, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "novel", **({"quantization_config": settings} if settings else {})})
    return with_numbers(open_folder(folder, name="a"))


def bits(tensor: Tensor, start: int = 0, count: int | None = None) -> np.ndarray:
    count = tensor.size if count is None else count
    return tensor.open().read(start, np.empty(count, tensor.dtype.storage))


def same(tensor: Tensor, expected: Any) -> None:
    assert tensor.dtype.name == "BF16" and tensor.shape == tuple(expected.shape)
    np.testing.assert_array_equal(bits(tensor), expected.to(torch.bfloat16).contiguous().view(torch.uint16).numpy().ravel())


def test_every_code_is_the_number_that_torch_makes_of_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    for name, dtype in {"F8_E4M3": E4M3, "F8_E5M2": E5M2, "F8_E8M0": torch.float8_e8m0fnu}.items():
        np.testing.assert_array_equal(table_of(name), codes.view(dtype).float().numpy())


FP8: dict[str, tuple[Any, str, Any]] = {
    "blocks": (random(0, 48, 64).to(E4M3), "_scale_inv", scales(1, 3, 4)),
    "a tensor": (random(0, 48, 64).to(E4M3), "_scale", scales(1)),
    "a tensor, one element": (random(0, 48, 64).to(E5M2), "_scale", scales(1, 1, 1)),
    "rows": (random(0, 48, 64).to(E4M3), "_scale", scales(1, 48, 1)),
    "groups": (random(0, 48, 64).to(E4M3), "_scale", scales(1, 48, 2).to(torch.bfloat16)),
    "powers of two": (random(0, 48, 64).to(E4M3), "_scale_inv", random_bytes(1, 48, 2, low=118, high=130)),
    "experts": (random(0, 3, 48, 64).to(E4M3), "_scale_inv", scales(1, 3, 3, 4)),
    "experts with a scale each": (random(0, 3, 48, 64).to(E4M3), "_scale", scales(1, 3, 1, 1)),
}


@pytest.mark.parametrize("kind", FP8)
def test_fp8_is_what_transformers_makes_of_it(tmp_path: Path, kind: str) -> None:
    codes, suffix, scale = FP8[kind]
    model = opened(tmp_path, {"up.weight": codes, f"up.weight{suffix}": scale, "up.input_scale": scales(3)})
    assert sorted(model.tensors) == ["norm.weight", "up.weight"]
    same(model.tensors["up.weight"], Fp8Dequantize(None)._dequantize_one(codes, scale, torch.bfloat16))


def test_a_scale_for_each_row_may_be_a_vector(tmp_path: Path) -> None:
    codes, scale = random(0, 48, 64).to(E4M3), scales(1, 48)
    model = opened(tmp_path, {"up.weight": codes, "up.weight_scale": scale}, quant_method="modelopt", quant_algo="FP8")
    same(model.tensors["up.weight"], codes.float() * scale[:, None])


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (48, 70), (17, 3)])
def test_blocks_at_the_edge_are_smaller(tmp_path: Path, rows: int, columns: int) -> None:
    """As in DeepSeek-V3's weight_dequant: scale[row // block, column // block]."""
    codes, scale = random(0, rows, columns).to(E4M3), scales(1, -(-rows // 16), -(-columns // 16))
    model = opened(tmp_path, {"up.weight": codes, "up.weight_scale_inv": scale}, quant_method="fp8", weight_block_size=[16, 16])
    whole = scale.repeat_interleave(16, 0).repeat_interleave(16, 1)[:rows, :columns]
    same(model.tensors["up.weight"], codes.float() * whole)


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    blocks, scale = random_bytes(0, 3, 20, 5, 16), random_bytes(1, 3, 20, 5, low=100, high=140)
    model = opened(tmp_path, {"experts.up_blocks": blocks, "experts.up_scales": scale}, quant_method="mxfp4")
    same(model.tensors["experts.up"], convert_moe_packed_tensors(blocks, scale))


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4", "FP8", "FP8_BLOCK", "FP8_DYNAMIC"])
def test_compressed_tensors_makes_the_same_of_its_files(tmp_path: Path, scheme: str) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

    preset: QuantizationScheme = preset_name_to_scheme(scheme, ["Linear"])
    preset.format = infer_module_format(torch.nn.Linear, preset)
    compressor = BaseCompressor.get_value_from_registry(preset.format)
    weight, grid = random(0, 128, 256).to(torch.bfloat16), {"NVFP4": (128, 16), "MXFP4": (128, 8), "FP8_BLOCK": (1, 2)}
    scale = scales(1, *grid.get(scheme, (128, 1) if scheme == "FP8_DYNAMIC" else (1,)))
    state = {"weight": weight, "weight_scale": 2.0 ** scale.log2().floor() if scheme == "MXFP4" else scale}
    if scheme == "NVFP4":
        state |= {"weight_scale": (scale * 400).to(E4M3).to(torch.bfloat16), "weight_global_scale": torch.tensor([391.7])}
    stored = compressor.compress(state, preset)
    settings = {"quant_method": "compressed-tensors", "format": preset.format.value, "config_groups": {}}
    model = opened(tmp_path, {f"up.{name}": value.contiguous() for name, value in stored.items()}, **settings)
    assert sorted(model.tensors) == ["norm.weight", "up.weight"]
    same(model.tensors["up.weight"], compressor.decompress(stored, preset)["weight"])


def test_nvfp4_of_modelopt(tmp_path: Path) -> None:
    """Its second scale multiplies; the formula of ModelOpt's NVFP4QTensor.dequantize."""
    codes, scale, second = random_bytes(0, 24, 16), scales(1, 24, 2).to(E4M3), torch.tensor(0.37)
    stored = {"up.weight": codes, "up.weight_scale": scale, "up.weight_scale_2": second, "up.input_scale": torch.tensor(0.5)}
    model = opened(tmp_path, stored, quant_method="modelopt", quant_algo="NVFP4")
    values = torch.tensor(E2M1)[torch.stack([codes & 15, codes >> 4], -1).reshape(24, 32).long()]
    same(model.tensors["up.weight"], values * (scale.float() * second).repeat_interleave(16, 1))


@given(start=st.integers(0, 2000), count=st.integers(1, 500), kind=st.sampled_from(["up.weight", "down.weight", "experts.up"]))
def test_any_window_is_a_part_of_the_whole(start: int, count: int, kind: str, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "windows"
    stored = {
        "up.weight": random(0, 40, 70).to(E4M3),
        "up.weight_scale_inv": scales(1, 3, 5),
        "down.weight_packed": random_bytes(0, 44, 32),
        "down.weight_scale": scales(1, 44, 4).to(E4M3),
        "experts.up_blocks": random_bytes(0, 3, 9, 5, 16),
        "experts.up_scales": random_bytes(1, 3, 9, 5, low=100, high=140),
    }
    model = opened(folder, stored, quant_method="fp8", weight_block_size=[16, 16])
    tensor = model.tensors[kind]
    count = min(count, tensor.size - start)
    np.testing.assert_array_equal(bits(tensor, start, count), bits(tensor)[start : start + count])


def test_numbers_have_the_type_that_the_config_names(tmp_path: Path) -> None:
    codes = random(0, 16, 16).to(E4M3)
    opened(tmp_path, {"up.weight": codes, "up.weight_scale": scales(1)})
    write_json(tmp_path / "config.json", {"text_config": {"dtype": "float16", "quantization_config": {"quant_method": "fp8"}}})
    model = with_numbers(open_folder(tmp_path))
    assert model.tensors["up.weight"].dtype.name == "F16" and model.config == {"text_config": {"dtype": "float16"}}
    np.testing.assert_array_equal(bits(model.tensors["up.weight"]), (codes.float() * scales(1)).half().numpy().ravel())


def fp8_llama(folder: Path, seed: int, near: Any = None) -> Any:
    """A tiny Llama whose layers are FP8 with blocks of 8 x 8, and its float weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**llama_config())).to(torch.bfloat16)
    settings = FineGrainedFP8Config(weight_block_size=(8, 8), modules_to_not_convert=["lm_head"])
    quantizer = Fp8Quantize(type("Quantizer", (), {"quantization_config": settings}))
    stored = {}
    for name, weight in model.state_dict().items():
        plain = ".layers." not in name or weight.ndim < 2
        stored |= {name: weight} if plain else quantizer.convert({name: weight})
    folder.mkdir()
    save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", llama_config(quantization_config=settings.to_dict()))
    write_tokenizer(folder)


def as_loaded(folder: Path) -> dict[str, Any]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


@pytest.mark.filterwarnings("ignore")
def test_a_merge_of_fp8_models_is_that_of_what_transformers_loads(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        fp8_llama(tmp_path / name, seed)
    recipe = write_recipe(tmp_path, experts=["a", "b"], merge={"method": "average"})
    result = moerge("merge", recipe, tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert sum("quantised tensors are read as bfloat16" in note for note in result.json["notes"]) == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    merged, loaded = as_loaded(tmp_path / "out"), [as_loaded(tmp_path / name) for name in ("a", "b")]
    for name, value in merged.items():
        mean = (loaded[0][name].double() + loaded[1][name].double()) / 2
        assert value.dtype == torch.bfloat16 and torch.equal(value, mean.to(torch.bfloat16)), name
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == merged.keys()


@pytest.mark.filterwarnings("ignore")
def test_a_gpt_oss_with_mxfp4_experts(tmp_path: Path) -> None:
    """Read as transformers loads it on a machine without the kernels of MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 2, "vocab_size": 64}
    config = GptOssConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_experts_per_tok=1)
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        model = GptOssForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        write_tokenizer(tmp_path / name)
        stored = load_file(tmp_path / name / "model.safetensors")
        for key in [key for key in stored if key.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = stored.pop(key).shape
            stored[f"{key}_blocks"] = random_bytes(seed, experts, outputs, inputs // 32, 16)
            stored[f"{key}_scales"] = random_bytes(seed, experts, outputs, inputs // 32, low=118, high=128)
        save_file(stored, tmp_path / name / "model.safetensors", {"format": "pt"})
        about = json.loads((tmp_path / name / "config.json").read_text())
        write_json(tmp_path / name / "config.json", {**about, "quantization_config": {"quant_method": "mxfp4"}})
    recipe = write_recipe(tmp_path, experts=["a"], merge={"method": "average"})
    result = moerge("merge", recipe, tmp_path / "out")
    assert result.code == 0, result.err
    merged, loaded = as_loaded(tmp_path / "out"), as_loaded(tmp_path / "a")
    assert merged.keys() == loaded.keys() and all(torch.equal(merged[name], loaded[name]) for name in merged)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "scales of a wrong shape": (
        {"up.weight": random(0, 48, 64).to(E4M3), "up.weight_scale_inv": scales(1, 5, 4)},
        ["'up.weight_scale_inv' has shape [5, 4]", "'up.weight' of shape [48, 64]"],
    ),
    "scales of fewer experts": (
        {"up.weight": random(0, 3, 48, 64).to(E4M3), "up.weight_scale_inv": scales(1, 2, 3, 4)},
        ["'up.weight_scale_inv' has shape [2, 3, 4]"],
    ),
    "no scale at all": (
        {"up.weight": random(0, 48, 64).to(E4M3), "up.weight_scale": scales(1, 0, 4)},
        ["'up.weight_scale' has shape [0, 4]"],
    ),
    "blocks without their scales": (
        {"up_blocks": random_bytes(0, 3, 4, 2, 16), "up_scales": random_bytes(1, 3, 4, 3)},
        ["'up_scales' has shape [3, 4, 3]", "[3, 4, 2]"],
    ),
    "two global scales": (
        {
            "up.weight_packed": random_bytes(0, 4, 8),
            "up.weight_scale": scales(1, 4, 1).to(E4M3),
            "up.weight_global_scale": scales(2, 2),
        },
        ["'up.weight_global_scale' has shape [2]"],
    ),
    "a zero point": (
        {"up.weight": random(0, 4, 8).to(E4M3), "up.weight_scale": scales(1), "up.weight_zero_point": random_bytes(2, 1)},
        ["is quantised", "'up.weight_zero_point'"],
    ),
    "integers of eight bits": (
        {"up.weight": random(0, 4, 8).to(torch.int8), "up.weight_scale": scales(1, 4, 1)},
        ["is quantised", "'up.weight_scale'"],
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_scales(tmp_path: Path, kind: str) -> None:
    tensors, parts = BAD[kind]
    with pytest.raises(InputError) as error:
        opened(tmp_path, tensors)
    assert str(error.value).startswith("a: ") and all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "torchao"])
def test_methods_that_are_not_read(tmp_path: Path, method: str) -> None:
    fp8_llama(tmp_path / "base", 0)
    write_json(tmp_path / "base" / "config.json", llama_config(quantization_config={"quant_method": method, "bits": 4}))
    recipe = write_recipe(tmp_path, experts={"a": "base"}, merge={"method": "average"})
    refuses(recipe, tmp_path / "out", "base: ", f"is quantised with {method}", "unquantised checkpoint it was made from")


def test_a_truncated_file_of_codes(tmp_path: Path) -> None:
    fp8_llama(tmp_path / "base", 0)
    file = tmp_path / "base" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    recipe = write_recipe(tmp_path, experts={"a": "base"}, merge={"method": "average"})
    refuses(recipe, tmp_path / "out", "model.safetensors", "truncated")
