"""Tables derived from transformers: equal to the hand-written ones, remembered, and what there is to say without them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.architecture.config import normalized_config
from moerge.architecture.derived import _derived, derived_family, no_family
from moerge.architecture.family import Family, expected_tensors
from moerge.architecture.registry import tabled_family
from tests.helpers.command import moerge, refuses
from tests.helpers.hf_models import CASES, load, logits, random_model, save, torch, transformers
from tests.helpers.tiny import read_values, write_recipe

pytestmark = pytest.mark.slow

BLOOM = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)


def table(family: Family, config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    tensors = expected_tensors(family, normalized_config(config, family))
    return {tensor.name: (tensor.role, tensor.shape) for tensor in tensors}


@pytest.mark.parametrize("case", CASES)
def test_a_derived_table_is_the_written_one(case: str) -> None:
    config = json.loads(CASES[case]().to_json_string(use_diff=False))
    written, derived = tabled_family(config), derived_family(config)
    assert written is not None and derived is not None
    names = table(derived, config)
    if case.startswith("gpt_neox"):  # transformers 5.24 writes lm_head
        names = {written.canonical_name(name): row for name, row in names.items()}
    assert names == table(written, config)


def write_models(folder: Path, config: Any = BLOOM) -> dict[str, Any]:
    models = {name: random_model(config, seed) for seed, name in enumerate(("math", "code"))}
    for name, model in models.items():
        save(model, folder / name)
    return models


def test_a_merge_has_roles_and_the_logits_of_averaged_modules(tmp_path: Path) -> None:
    first, second = write_models(tmp_path).values()
    overrides = [{"match": "layers.1.attention", "method": "passthrough", "model": "math"}]
    recipe = write_recipe(tmp_path, base=None, experts=("math", "code"), merge={"method": "linear", "overrides": overrides})
    result = moerge("merge", recipe, tmp_path / "out", "--quiet")
    assert (result.code, result.err) == (0, "")
    other = second.state_dict()
    mean = {
        name: tensor if ".1.self_attention" in name else (tensor + other[name]) / 2 for name, tensor in first.state_dict().items()
    }
    first.load_state_dict(mean)
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(first), atol=1e-5, rtol=0)
    shown = moerge("inspect", tmp_path / "out", "--json").json
    assert shown["family"] == "bloom" and shown["layers"] == 3
    assert {"embedding", "layers.*.attention.qkv", "layers.*.ffn.down.bias", "norm.final"} <= {r["role"] for r in shown["roles"]}


def test_slices_of_a_derived_family(tmp_path: Path) -> None:
    write_models(tmp_path)
    sources = [
        [{"model": str(tmp_path / "math"), "layer_range": [0, 2]}],
        [{"model": str(tmp_path / "code"), "layer_range": [1, 3]}],
    ]
    recipe = tmp_path / "slices.yaml"
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": [{"sources": part} for part in sources]}))
    result = moerge("merge", recipe, tmp_path / "out", "--quiet")
    assert result.code == 0, result.err
    made, math, code = (read_values(tmp_path / name) for name in ("out", "math", "code"))
    for layer, (model, own) in enumerate(((math, 0), (math, 1), (code, 1), (code, 2))):
        name = "transformer.h.{}.mlp.dense_h_to_4h.weight"
        np.testing.assert_array_equal(made[name.format(layer)], model[name.format(own)])
    assert logits(load(tmp_path / "out")).isfinite().all()


def test_a_layer_of_another_kind_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.JambaConfig(
        **sizes, num_hidden_layers=4, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=9, num_experts=1,
        expert_layer_offset=8, mamba_d_state=4, mamba_dt_rank=4, pad_token_id=0,
    )  # fmt: skip
    write_models(tmp_path, config)
    recipe = tmp_path / "slices.yaml"
    part = {"sources": [{"model": str(tmp_path / "math"), "layer_range": [0, 1]}]}
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": [part, part]}))
    refuses(recipe, tmp_path / "out", "slices: config.json cannot say this order of layers", "layers.1.", "layer 0 of math")


def test_tables_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = {**BLOOM.to_dict(), "vocab_size": 80}
    first = derived_family(config)
    (file,) = (tmp_path / "moerge" / "tables").rglob("*.json")
    assert f"transformers-{transformers.__version__}" in str(file)
    _derived.cache_clear()
    monkeypatch.setattr("moerge.architecture.derived._ask", lambda config: pytest.fail("asked again"))
    again = derived_family({**config, "transformers_version": "4.1"})
    assert first is not None and again is not None and again.tensors == first.tensors
    _derived.cache_clear()
    file.write_text("{")
    monkeypatch.setattr("moerge.architecture.derived._ask", lambda config: {"reason": "asked again"})
    assert derived_family(config) is None and no_family(config) == "asked again"
    _derived.cache_clear()


def test_what_is_said_where_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not know it either" in no_family({"model_type": "my_own"})
    assert "n_layers is more than any model has" in no_family({**BLOOM.to_dict(), "n_layers": 10**9})
    assert "cannot make a BloomForCausalLM of config.json" in no_family({**BLOOM.to_dict(), "n_head": 5})
    monkeypatch.setattr("moerge.architecture.derived.find_spec", lambda name: None)
    assert "pip install 'moerge[models]'" in no_family({**BLOOM.to_dict(), "vocab_size": 33})
    _derived.cache_clear()


def test_an_adapter_of_a_family_that_files_spell_otherwise(tmp_path: Path) -> None:
    """EXAONE's files have c_fc_0 where modules in memory are gate_proj: peft is the judge, with the names that it knows."""
    peft = pytest.importorskip("peft", reason="needs moerge[tune]")
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = write_models(tmp_path, transformers.ExaoneConfig(**sizes, num_hidden_layers=2, max_position_embeddings=64))
    assert any("c_fc_0" in name for name in read_values(tmp_path / "math"))
    extracted = moerge("extract", tmp_path / "code", tmp_path / "lora", "--base", tmp_path / "math", "--rank", 4, "--quiet")
    assert extracted.code == 0, extracted.err
    experts = {"code": {"model": str(tmp_path / "math"), "adapter": str(tmp_path / "lora")}}
    result = moerge("merge", write_recipe(tmp_path, base=None, experts=experts), tmp_path / "out", "--quiet")
    assert result.code == 0, result.err
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about names that transformers 5.24 changes
        judge = peft.PeftModel.from_pretrained(load(tmp_path / "math"), str(tmp_path / "lora")).eval()
    found, wanted = logits(load(tmp_path / "out")), logits(judge)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(wanted, logits(models["math"]), atol=1e-2)


def test_a_tensor_whose_shape_depends_on_the_number_of_layers_cannot_be_sliced(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    more = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}
    config = transformers.Gemma4TextConfig(**sizes, **more, num_hidden_layers=2, num_kv_shared_layers=0, pad_token_id=0)
    write_models(tmp_path, config)
    recipe = tmp_path / "slices.yaml"
    parts = [{"sources": [{"model": str(tmp_path / "math"), "layer_range": span}]} for span in ([0, 2], [1, 2])]
    recipe.write_text(json.dumps({"merge_method": "passthrough", "slices": parts}))
    refuses(recipe, tmp_path / "out", "slices: tensor", "embed_tokens_per_layer", "depends on the number of layers")
