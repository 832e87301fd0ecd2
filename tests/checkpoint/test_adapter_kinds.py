"""Adapters of everyday kinds, as peft writes them: added tokens, tied embeddings, multimodal models under their file names."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.checkpoint.adapter import apply_adapter
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from moerge.tensors.views.low_rank import read_float32
from tests.helpers.hf_models import FAMILIES, load, logits, random_model, save, torch, transformers
from tests.helpers.multimodal import MULTIMODAL
from tests.helpers.tiny import VOCABULARY, read_values, write_tokenizer

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'moerge[dev]')")

pytestmark = pytest.mark.filterwarnings("ignore")


def trained(base: Any, folder: Path, *, rows: int = 0, **settings: Any) -> Any:
    """An adapter of `base`, resized to `rows`, with random values, saved as peft saves it."""
    if rows:
        base.resize_token_embeddings(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=6, **settings))
        torch.manual_seed(5)
        done = set()
        for name, parameter in model.named_parameters():
            if (parameter.requires_grad or "lora_" in name) and id(parameter) not in done:
                done.add(id(parameter))
                parameter.data.copy_(parameter.data + 0.2 * torch.randn_like(parameter))
        model.save_pretrained(folder, save_embedding_layers=True if rows else "auto")
    return model.eval()


@pytest.mark.parametrize("name", MULTIMODAL)
def test_multimodal_models_under_their_file_names(tmp_path: Path, name: str) -> None:
    base = save(random_model(MULTIMODAL[name](), 1), tmp_path / "base")
    model = trained(load(base), tmp_path / "adapter", target_modules=["q_proj", "down_proj", "qkv"])
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found, wanted = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base))), read_values(tmp_path / "merged")
    assert found.tensors.keys() == wanted.keys()
    before = read_values(base)
    assert sum(bool((before[key] != wanted[key]).any()) for key in wanted) > 2
    for key, tensor in found.tensors.items():
        np.testing.assert_allclose(read_float32(tensor), wanted[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_an_adapter_of_the_text_model_alone(tmp_path: Path) -> None:
    """Qwen3.5's adapters are trained on the causal model, whose modules lack what the whole model's have around them."""
    base = save(random_model(MULTIMODAL["qwen3_5"](), 1), tmp_path / "base")
    text = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = trained(text, tmp_path / "adapter", target_modules=["q_proj", "in_proj_qkv"])
    assert any("model.layers.0.linear_attn" in key for key in locate(str(tmp_path / "adapter")).tensors)
    found = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base)))
    wanted = model.merge_and_unload().state_dict()
    compared = 0
    for key, tensor in found.tensors.items():
        own = wanted.get(key.replace("model.language_model.", "model."))
        if own is not None:
            compared += not np.array_equal(read_float32(tensor), read_values(base)[key])
            np.testing.assert_allclose(read_float32(tensor), own.numpy(), rtol=1e-6, atol=1e-6, err_msg=key)
    assert compared == 2


TOKENS: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "saved": (False, 66, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized": (False, 66, {"target_modules": ["q_proj"]}),
    "lora": (False, 66, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "rows": (False, 0, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "rows of both": (
        False,
        0,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [9]}},
    ),
    "rows that are new": (False, 66, {"target_modules": ["q_proj"], "trainable_token_indices": [64, 65]}),
    "tied, saved": (True, 66, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, lora": (True, 0, {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}),
    "tied, resized lora": (True, 66, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied, head's lora": (True, 0, {"target_modules": ["lm_head"], "ensure_weight_tying": True}),
    "tied, rows": (True, 0, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "tied, rows that are new": (True, 66, {"target_modules": ["q_proj"], "trainable_token_indices": [64, 65]}),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_embeddings_that_were_trained(tmp_path: Path, kind: str) -> None:
    """The merged model's logits are those of the model that was trained."""
    tied, rows, settings = TOKENS[kind]
    base = save(random_model(FAMILIES["llama"](tie_word_embeddings=tied), 1), tmp_path / "base")
    model = trained(load(base), tmp_path / "adapter", rows=rows, **settings)
    if rows:
        write_tokenizer(tmp_path / "adapter", ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY)), "<x>", "<y>"])
    recipe = {
        "base": str(base),
        "experts": {"adapter": str(tmp_path / "adapter")},
        "merge": {"method": "average"},
        **({"tokenizer": "adapter"} if rows else {}),
    }
    moerge.merge(recipe, tmp_path / "out")
    tokens = torch.tensor([[3, 7, 9, (rows or VOCABULARY) - 1, 5, 3]])
    wanted = logits(model, tokens)
    np.testing.assert_allclose(logits(load(tmp_path / "out"), tokens), wanted, rtol=0, atol=2e-5)
    assert not np.allclose(logits(load(base), tokens.clamp(max=VOCABULARY - 1)), wanted[..., :VOCABULARY], atol=1e-2)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_resized_embedding_of_a_nested_config(tmp_path: Path, name: str) -> None:
    base = save(random_model(MULTIMODAL[name](), 1), tmp_path / "base")
    trained(load(base), tmp_path / "adapter", rows=70, target_modules=["q_proj"])
    found = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base)))
    assert found.config["text_config"]["vocab_size"] == 70
    assert "vocab_size" not in found.config or found.config["vocab_size"] == 70
    stored = locate(str(tmp_path / "adapter")).tensors
    name = next(key for key in found.tensors if key.endswith("embed_tokens.weight"))
    own = next(key for key in stored if key.endswith("embed_tokens.weight"))
    assert np.array_equal(read_float32(found.tensors[name]), read_float32(stored[own]))


def test_rows_of_one_of_two_that_are_tied(tmp_path: Path) -> None:
    base = save(random_model(FAMILIES["llama"](tie_word_embeddings=True), 1), tmp_path / "base")
    rows = {"embed_tokens": [5], "lm_head": [6]}
    trained(load(base), tmp_path / "adapter", target_modules=["q_proj"], trainable_token_indices=rows)
    with pytest.raises(InputError, match=r"lm_head\.weight.*which the base ties"):
        apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base)))
