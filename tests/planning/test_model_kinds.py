"""Embedding, reward and classification models of known families, stacked VLMs, nested configs: as transformers loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import moerge
from moerge.inspection import inspect
from tests.helpers import hf_models, tiny

_KINDS = {
    "embedding": ("qwen3", "Qwen3Model"),
    "reward": ("llama", "LlamaForSequenceClassification"),
    "token": ("qwen2", "Qwen2ForTokenClassification"),
    "answers": ("llama", "LlamaForQuestionAnswering"),
    "gemma": ("gemma2", "Gemma2Model"),
}


def _model(config: Any, name: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", _KINDS)
def test_other_classes_of_a_family_merge_verify_and_are_inspected(tmp_path: Path, kind: str) -> None:
    family, name = _KINDS[kind]
    config = hf_models.FAMILIES[family](tie_word_embeddings=False)
    states = {}
    for seed, model in enumerate(("base", "a", "b")):
        made = _model(config, name, seed)
        states[model] = {key: value.double() for key, value in made.state_dict().items()}
        hf_models.save(made, tmp_path / model)
    plan = moerge.plan(tiny.write_recipe(tmp_path, experts=["a", "b"], merge={"method": "task_arithmetic", "scale": 0.5}))
    moerge.merge(plan, tmp_path / "out", threads=1)
    assert not [text for text in plan.warnings if "merged by name" in text]
    assert moerge.verify(tmp_path / "out").problems == () == moerge.verify(tmp_path / "a").problems
    loaded, report = getattr(transformers, name).from_pretrained(tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for key, value in loaded.state_dict().items():
        wanted = states["base"][key] + 0.5 * (states["a"][key] + states["b"][key] - 2 * states["base"][key])
        torch.testing.assert_close(value.double(), wanted, atol=1e-6, rtol=1e-6)
    roles = {role.role for role in inspect(tmp_path / "a").roles}
    assert {"embedding", "layers.*.attention.q"} <= roles and "head" not in roles


@pytest.mark.parametrize("family", ["gemma3", "qwen2_vl"])
def test_stacked_layers_of_a_vision_language_model_keep_its_vision(tmp_path: Path, family: str) -> None:
    hf_models.save(hf_models.random_model(hf_models.FAMILIES[family](), 1), tmp_path / "a")
    spans = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": span}]} for span in ([0, 2], [1, 2])]
    recipe = {"slices": spans, "merge_method": "passthrough", "dtype": "float32"}
    path = tmp_path / "mergekit.yml"
    tiny.write_json(path, recipe)
    plan = moerge.plan(path)
    moerge.merge(plan, tmp_path / "out", threads=1)
    assert not plan.warnings
    own, found = tiny.read_tensors(tmp_path / "a"), tiny.read_tensors(tmp_path / "out")
    beside = [name for name in own if "visual" in name or "vision" in name or "projector" in name]
    assert beside and all(found[name].tobytes() == own[name].tobytes() for name in beside)
    assert moerge.verify(tmp_path / "out").problems == ()
    hf_models.load(tmp_path / "out")
    without = {name: values for name, values in tiny.read_values(tmp_path / "out").items() if name not in beside}
    tiny.write_checkpoint(tmp_path / "bare", without, hf_models.read_config(tmp_path / "out"), dtype="F32")
    assert any("beside its language model" in problem for problem in moerge.verify(tmp_path / "bare").problems)


@pytest.mark.parametrize("family", ["bloom", "gemma3"])
def test_verify_finds_what_transformers_needs(tmp_path: Path, family: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = hf_models.FAMILIES[family]() if family in hf_models.FAMILIES else transformers.BloomConfig(**sizes)
    hf_models.save(hf_models.random_model(config, 1), tmp_path / "a")
    assert moerge.verify(tmp_path / "a").problems == ()
    values, settings = tiny.read_values(tmp_path / "a"), hf_models.read_config(tmp_path / "a")
    norm = next(name for name in values if "norm" in name and "language_model" not in name and name.endswith("weight"))
    for folder, changed in (("missing", {}), ("shape", {norm: np.zeros(3, np.float32)})):
        rest = {name: tensor for name, tensor in values.items() if name != norm}
        tiny.write_checkpoint(tmp_path / folder, {**rest, **changed}, settings, dtype="F32")
        found = moerge.verify(tmp_path / folder).problems
        assert len(found) == 1 and norm.removeprefix("model.") in found[0], found
        assert ("transformers" in found[0]) == (family == "gemma3")  # of bloom the derived table says it first
    tiny.write_checkpoint(tmp_path / "more", {**values, "extra.weight": np.zeros(3, np.float32)}, settings, dtype="F32")
    more = moerge.verify(tmp_path / "more")
    assert more.problems == () and any("extra.weight" in note for note in more.notes)


def test_a_nested_config_of_an_unknown_family_gets_the_rows(tmp_path: Path) -> None:
    text = {**tiny.llama_config(), "model_type": "mystery_text"}
    for name, rows in (("base", 64), ("a", 70)):
        config = {"model_type": "mystery", "text_config": {**text, "vocab_size": rows}, "vision_config": {"depth": 1}}
        tensors = tiny.llama_tensors({**text, "vocab_size": rows})
        tokens = [f"t{number}" for number in range(rows)]
        tiny.write_checkpoint(tmp_path / name, tensors, config, dtype="F32", tokenizer=False)
        tiny.write_tokenizer(tmp_path / name, tokens)
    recipe = tiny.write_recipe(tmp_path, experts=["a"], tokenizer="union", merge={"method": "task_arithmetic"})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    config = hf_models.read_config(tmp_path / "out")
    written = hf_models.read_config(tmp_path / "base")
    assert config.keys() == written.keys() | {"dtype", "torch_dtype"} and config["text_config"] == {**text, "vocab_size": 70}
    assert tiny.read_values(tmp_path / "out")["model.embed_tokens.weight"].shape[0] == 70
