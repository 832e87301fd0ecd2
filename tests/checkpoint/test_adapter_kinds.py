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
from moerge.tensors.views.low_rank import LowRankTensor, read_float32
from tests.helpers.hf_models import FAMILIES, load, logits, random_model, save, torch, transformers
from tests.helpers.multimodal import MULTIMODAL
from tests.helpers.tiny import VOCABULARY, read_values, write_json, write_safetensors, write_tokenizer

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


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_convolutions(tmp_path: Path, name: str, dora: bool) -> None:
    """The patches of images: a convolution's weight is a matrix in another shape."""
    base = save(random_model(MULTIMODAL[name](), 1), tmp_path / "base")
    targets = ["patch_embed.proj"] if name == "qwen2_5_vl" else ["patch_embedding"]
    model = trained(load(base), tmp_path / "adapter", target_modules=targets, use_dora=dora)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, wanted = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base))), read_values(tmp_path / "merged")
    before = read_values(base)
    assert sum(bool((before[key] != wanted[key]).any()) for key in wanted) == 1
    for key, tensor in found.tensors.items():
        np.testing.assert_allclose(read_float32(tensor), wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_dora_on_an_embedding(tmp_path: Path) -> None:
    base = save(random_model(FAMILIES["llama"](tie_word_embeddings=False), 1), tmp_path / "base")
    model = trained(load(base), tmp_path / "adapter", target_modules=["embed_tokens", "q_proj"], use_dora=True)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    found, wanted = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base))), read_values(tmp_path / "merged")
    assert not np.allclose(wanted["model.embed_tokens.weight"], read_values(base)["model.embed_tokens.weight"], atol=1e-2)
    for key, tensor in found.tensors.items():
        np.testing.assert_allclose(read_float32(tensor), wanted[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_a_folder_of_adapters(tmp_path: Path) -> None:
    """peft puts an adapter with a name of its own into a folder of that name."""
    base = save(random_model(FAMILIES["llama"](), 1), tmp_path / "base")
    model = peft.get_peft_model(load(base), peft.LoraConfig(target_modules=["q_proj"]), adapter_name="mine")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "mine" / "adapter_config.json").is_file()
    found = apply_adapter(locate(str(tmp_path / "saved")), locate(str(base)))
    assert isinstance(found.tensors["model.layers.0.self_attn.q_proj.weight"], LowRankTensor)
    model.add_adapter("other", peft.LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(InputError, match=r"saved holds 2 adapters \(mine, other\): name the folder of one"):
        locate(str(tmp_path / "saved"))


def test_an_adapter_of_several_files(tmp_path: Path) -> None:
    base = save(random_model(FAMILIES["llama"](), 1), tmp_path / "base")
    trained(load(base), tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    whole = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base)))
    values = {key: read_float32(tensor) for key, tensor in whole.tensors.items()}
    stored = read_values(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    places = {}
    for number, letter in enumerate("AB", 1):
        file = f"adapter_model-0000{number}-of-00002.safetensors"
        part = {key: value for key, value in stored.items() if f"lora_{letter}" in key}
        write_safetensors(tmp_path / "adapter" / file, part, dtype="F32")
        places |= dict.fromkeys(part, file)
    write_json(tmp_path / "adapter" / "adapter_model.safetensors.index.json", {"weight_map": places})
    found = apply_adapter(locate(str(tmp_path / "adapter")), locate(str(base)))
    for key, tensor in found.tensors.items():
        assert np.array_equal(read_float32(tensor), values[key])
    (tmp_path / "adapter" / file).unlink()
    with pytest.raises(InputError, match=r"index\.json names adapter_model-00002-of-00002\.safetensors, which is missing"):
        locate(str(tmp_path / "adapter"))
