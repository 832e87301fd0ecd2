"""Adapters that peft trained and merged itself: the same weights, for layers that store [out, in], [in, out] and fused ones."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.tensors.views.low_rank import LowRankTensor, read_float32

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
"""Square attention matrices, so that shapes do not tell which way round a matrix is stored."""
MODELS: dict[str, tuple[Any, list[str], list[str], str]] = {
    "llama": (
        lambda: transformers.LlamaConfig(
            **SIZES, intermediate_size=24, num_key_value_heads=1, attention_bias=True, tie_word_embeddings=False
        ),
        ["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"],
        ["q_proj", "v_proj", "o_proj"],
        "norm",
    ),
    "gpt2": (
        lambda: transformers.GPT2Config(
            vocab_size=50,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        ),
        ["c_attn", "c_proj", "c_fc", "wte", "lm_head"],
        ["c_attn", "c_proj"],
        "ln_f",
    ),
    "neox": (
        lambda: transformers.GPTNeoXConfig(**SIZES, intermediate_size=24, tie_word_embeddings=False),
        ["query_key_value", "dense_h_to_4h", "dense", "embed_in", "lm_head"],
        ["query_key_value", "dense"],
        "final_layer_norm",
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"first": 3}, "alpha_pattern": {"^.*0.*first": 7, "first": 2}},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"modules_to_save": ["whole"]},
    "biases": {"bias": "all"},
    "lora_biases": {"bias": "lora_only"},
    "eva": {"init_lora_weights": "eva"},
    "mica": {"init_lora_weights": "mica"},
    "bfloat16": {},
}


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A family, and a base of it with random weights."""
    folder = tmp_path_factory.mktemp(request.param)
    config = MODELS[request.param][0]()
    config.torch_dtype = torch.float32
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder / "base")
    yield request.param, folder
    transformers.utils.logging.enable_progress_bar()


def settings_of(family: str, name: str) -> dict[str, Any]:
    _, everything, biased, whole = MODELS[family]
    settings = {"r": 4, "lora_alpha": 10, **SETTINGS[name]}
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {pattern.replace("first", everything[0]): value for pattern, value in settings.get(key, {}).items()}
    if "modules_to_save" in settings:
        settings["modules_to_save"] = [whole]
    return {"target_modules": biased if name in ("lora_bias", "mica") else everything, **settings}


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_as_peft_merges_it(base: tuple[str, Path], name: str) -> None:
    family, folder = base
    model = peft.get_peft_model(load(folder / "base"), peft.LoraConfig(**settings_of(family, name)))
    torch.manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.requires_grad or "lora_" in key:
            parameter.data = 0.2 * torch.randn_like(parameter) + ("magnitude" in key)
    if name == "bfloat16":
        for key, parameter in model.named_parameters():
            if "lora_" in key:  # such that products are exact in float32, as peft rounds them to bfloat16 otherwise
                parameter.data = (parameter.data.sign() * 0.5).to(torch.bfloat16)
    for made in ("adapter", "merged"):
        shutil.rmtree(folder / made, ignore_errors=True)
    model.save_pretrained(folder / "adapter")
    peft.PeftModel.from_pretrained(load(folder / "base"), folder / "adapter").merge_and_unload().save_pretrained(
        folder / "merged"
    )

    found = apply_adapter(locate(str(folder / "adapter")), locate(str(folder / "base")))
    expected = locate(str(folder / "merged"))
    assert found.tensors.keys() == expected.tensors.keys()
    layers = 2 * (len(settings_of(family, name)["target_modules"]) - (0 if name in ("lora_bias", "mica") else 2))
    changed = sum(isinstance(tensor, LowRankTensor) for tensor in found.tensors.values())
    assert changed >= layers
    for key, tensor in found.tensors.items():
        np.testing.assert_allclose(read_float32(tensor), read_float32(expected.tensors[key]), rtol=1e-6, atol=1e-6, err_msg=key)
