"""Adapters that cannot be used: one sentence each, that says why."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from tests.helpers.adapters import low_rank, write_adapter
from tests.helpers.tiny import make_models, read_values, write_json, write_safetensors

Q = "model.layers.0.self_attn.q_proj"


def refused(adapter: Path, base: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        apply_adapter(locate(str(adapter), name="math"), locate(str(base), name="base"))
    message = str(caught.value)
    assert "\n" not in message and message.startswith("math: "), message
    for part in parts:
        assert part in message, f"{part!r} is not in: {message}"


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"peft_type": "IA3"}, "of type IA3, moerge reads LORA: merge it into its base with peft (merge_and_unload)"),
        ({"peft_type": "PREFIX_TUNING"}, "a PREFIX_TUNING adapter adds virtual tokens or layers, no weights"),
        ({"peft_type": None}, "of type NONE"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "repeats layers of the base"),
        ({"megatron_config": {"tp": 2}}, "Megatron's parallel layers"),
        ({"use_qalora": True}, "QALoRA"),
        ({"alora_invocation_tokens": [7]}, "acts on some tokens only (aLoRA)"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialised by 'pissa_niter_4', which changes the base's weights first"),
        ({"init_lora_weights": "OLoRA"}, "initialised by 'olora'"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"rank_pattern": {"(": 3}}, "rank_pattern: '(' is not a regular expression"),
        ({"lora_alpha": "many"}, "lora_alpha: Input should be a valid number"),
        ({"modules_to_save": "norm"}, "modules_to_save: Input should be a valid list"),
        ({"r": 16}, f"'{Q}' has rank 8, but adapter_config.json gives it 16"),
        ({"use_dora": True}, f"lacks a DoRA magnitude for '{Q}'"),
    ],
)
def test_kinds_that_are_no_change_of_weights_are_refused(tmp_path: Path, config: Mapping[str, Any], reason: str) -> None:
    base = make_models(tmp_path)["base"]
    refused(write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8), **config), base, str(tmp_path / "lora"), reason)


@pytest.mark.parametrize("start", ["eva", "gaussian", "orthogonal", "mica", True, False, None])
def test_initialisations_that_leave_the_base_alone(tmp_path: Path, start: Any) -> None:
    base = make_models(tmp_path)["base"]
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8), init_lora_weights=start)
    assert apply_adapter(locate(str(adapter)), locate(str(base))).tensors


A, B = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({B: None}, f"the adapter has no {Q}.lora_B.weight: fetch or copy it again"),
        ({A: np.zeros((8, 17))}, "by a matrix of [16, 17], but the base's has shape [16, 16]: was it trained on this base?"),
        ({A: np.zeros((7, 16))}, "which do not multiply"),
        ({A: np.zeros(0)}, "which do not multiply"),
        ({B: np.zeros((16, 8), np.int32)}, "is of type I32: only float tensors"),
        ({"model.layers.9.mlp.up_proj.lora_A.weight": np.zeros((8, 16))}, "has no tensor 'model.layers.9.mlp.up_proj.weight'"),
        ({"score.weight": np.zeros((2, 16))}, "tensor 'base_model.model.score.weight' of the adapter has no place in the base"),
        ({f"{Q}.lora_diag": np.zeros(8)}, "lora_diag' of the adapter has no place"),
        ({"model.norm.weight": np.zeros(15)}, "has shape [15], the base's is [16]: was the adapter trained on this base?"),
        ({f"{Q}.lora_B.bias": np.zeros(16)}, f"lora_bias adds a bias to '{Q}', which has none in the base"),
        ({f"{Q}.lora_magnitude_vector": np.zeros(16)}, f"has a DoRA magnitude for '{Q}', unlike its adapter_config.json"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, changes: Mapping[str, Any], reason: str) -> None:
    base = make_models(tmp_path)["base"]
    tensors = {**low_rank(Q, (16, 16), rank=8), **changes}
    kept = {
        name: value.astype(np.float32) if value.dtype == np.float64 else value
        for name, value in tensors.items()
        if value is not None
    }
    refused(write_adapter(tmp_path / "lora", kept), base, reason)


def test_a_magnitude_of_the_wrong_length(tmp_path: Path) -> None:
    base = make_models(tmp_path)["base"]
    stored = {**low_rank(Q, (16, 16), rank=8), f"{Q}.lora_magnitude_vector": np.ones(9, np.float32)}
    refused(write_adapter(tmp_path / "lora", stored, use_dora=True), base, "has 9 elements, expected 16")


@pytest.mark.parametrize(
    ("tensors", "config", "named"),
    [
        (low_rank("lm_head", (64, 16), rank=8), {}, "lm_head.weight"),
        (
            {
                "model.embed_tokens.lora_embedding_A": np.zeros((8, 64), np.float32),
                "model.embed_tokens.lora_embedding_B": np.zeros((16, 8), np.float32),
            },
            {},
            "model.embed_tokens.weight",
        ),
        (
            {
                "model.embed_tokens.lora_embedding_A": np.zeros((8, 64), np.float32),
                "model.embed_tokens.lora_embedding_B": np.zeros((16, 8), np.float32),
                **low_rank("lm_head", (64, 16), rank=8),
            },
            {"ensure_weight_tying": True, "alpha_pattern": {"lm_head": 3}},
            "lm_head.weight",
        ),
        (
            {"model.embed_tokens.weight": np.zeros((64, 16), np.float32)},
            {"modules_to_save": ["embed_tokens"]},
            "model.embed_tokens.weight",
        ),
    ],
)
def test_what_would_untie_head_and_embedding_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], config: Mapping[str, Any], named: str
) -> None:
    base = make_models(tmp_path, tied=True)["base"]
    refused(
        write_adapter(tmp_path / "lora", tensors, **config),
        base,
        f"changes '{named}', which the base ties",
        "untie base and experts",
    )


def test_folders(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(
        InputError, match=r"holds adapter_model\.bin, a pickle, which moerge does not load \(.*\); convert it with: python -c"
    ):
        locate(str(adapter))
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match=r"has adapter_config\.json, but no adapter_model\.safetensors"):
        locate(str(adapter))
    write_safetensors(adapter / "adapter_model.safetensors", {})
    with pytest.raises(InputError, match=r"adapter_model\.safetensors holds no tensors"):
        locate(str(adapter))
    write_json(models["math"] / "adapter_config.json", {"peft_type": "LORA"})
    assert locate(str(models["math"])).model_type == "llama"
    write_safetensors(models["math"] / "adapter_model.safetensors", {"x": np.zeros(2, np.float32)})
    with pytest.raises(InputError, match=r"has both model\.safetensors and adapter_model\.safetensors"):
        locate(str(models["math"]))


def test_the_conversion_of_a_pickle_works(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8))
    before = read_values(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({name: torch.from_numpy(value.T.copy()).T for name, value in before.items()}, adapter / "adapter_model.bin")
    with pytest.raises(InputError) as caught:
        locate(str(adapter))
    exec(str(caught.value).split('python -c "')[1].rstrip('"'), {})
    after = read_values(adapter)
    assert after.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.parametrize(
    ("indices", "rows", "named"),
    [
        ([3, 5], 3, "names 2 rows"),
        ([3, 64], 2, "names 2 rows"),
        ({"lm_head": [1]}, 1, "names 0 rows"),
        ("all", 1, "trainable_token"),
    ],
)
def test_rows_that_do_not_fit(tmp_path: Path, indices: object, rows: int, named: str) -> None:
    base = make_models(tmp_path)["base"]
    stored = {"model.embed_tokens.token_adapter.trainable_tokens_delta": np.zeros((rows, 16), np.float32)}
    refused(write_adapter(tmp_path / "lora", stored, trainable_token_indices=indices), base, named)
