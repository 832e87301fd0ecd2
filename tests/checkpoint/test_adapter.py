"""Adapters as models: values against a slow formula, names, shapes, scales and warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.checkpoint.adapter import AdaptedCheckpoint, apply_adapter
from moerge.checkpoint.adapter_config import AdapterConfig
from moerge.checkpoint.locate import locate
from moerge.tensors.dtypes import F32
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.low_rank import LowRankTensor, RecentFactors, add_product, read_float32
from tests.helpers.adapters import PREFIX, InMemory, low_rank, merged, with_magnitude, write_adapter
from tests.helpers.tiny import (
    llama_config,
    llama_tensors,
    make_models,
    read_values,
    write_checkpoint,
    write_json,
    write_tokenizer,
)

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def apply(adapter: Path, base: Path) -> AdaptedCheckpoint:
    return apply_adapter(locate(str(adapter), name="math"), locate(str(base), name="base"))


def in_memory(values: np.ndarray) -> Tensor:
    return InMemory("w", np.ascontiguousarray(values, np.float32))


def computed(
    base: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, transposed: bool, m: np.ndarray | None
) -> LowRankTensor:
    magnitude = None if m is None else in_memory(m)
    return LowRankTensor(in_memory(base), in_memory(a), in_memory(b), scale, transposed, magnitude, Path(), RecentFactors())


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 99), st.data())
def test_any_run_of_elements_equals_the_formula(
    outputs: int, inputs: int, rank: int, transposed: bool, dora: bool, seed: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((inputs, outputs) if transposed else (outputs, inputs), np.float32)
    a, b = rng.standard_normal((rank, inputs), np.float32), rng.standard_normal((outputs, rank), np.float32)
    magnitude = rng.random(outputs, np.float32) if dora else None
    tensor = computed(base, a, b, 0.7, transposed, magnitude)
    expected = merged(base, a, b, 0.7, transposed=transposed)
    if magnitude is not None:
        expected = with_magnitude(expected, magnitude, transposed=transposed)
    whole = read_float32(tensor)
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-5)
    start = data.draw(st.integers(0, base.size - 1))
    count = data.draw(st.integers(1, base.size - start))
    part = tensor.open().read(start, np.empty(count, np.float32))
    np.testing.assert_array_equal(part, whole.reshape(-1)[start : start + count])


def test_large_tensors_do_not_depend_on_windows_or_threads() -> None:
    rng = np.random.default_rng(0)
    base, a, b = (rng.standard_normal(shape, np.float32) for shape in ((300, 700), (16, 700), (300, 16)))
    whole = read_float32(computed(base, a, b, 2.0, False, None))
    np.testing.assert_allclose(whole, merged(base, a, b, 2.0), rtol=1e-4, atol=1e-4)
    elements = computed(base, a, b, 2.0, False, None).open()
    starts = range(0, base.size, 1777)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda start: elements.read(start, np.empty(min(1777, base.size - start), np.float32)), starts))
    np.testing.assert_array_equal(np.concatenate(parts), whole.reshape(-1))


@given(st.integers(1, 11), st.integers(1, 3), st.integers(1, 1100))
def test_the_sum_over_the_rank_runs_in_order(rank: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng([rank, rows, columns])
    left, right = rng.standard_normal((rows, rank), np.float32), rng.standard_normal((rank, columns), np.float32)
    out = rng.standard_normal((rows, columns), np.float32)
    expected = np.zeros_like(out)
    for k in range(rank):
        expected += left[:, k : k + 1] * right[k]
    expected = out + np.float32(0.3) * expected
    add_product(left, right, np.float32(0.3), 0, out)
    np.testing.assert_array_equal(out, expected)


def test_factors_are_loaded_once_for_all_chunks_and_forgotten_later() -> None:
    recent, loads = RecentFactors(), []

    class Counted(LowRankTensor):
        def load(self) -> Any:
            loads.append(self.name)
            return super().load()

    def tensor(name: str) -> LowRankTensor:
        base = InMemory(name, np.zeros((2, 2), np.float32))
        return Counted(base, in_memory(np.ones((1, 2))), in_memory(np.ones((2, 1))), 1.0, False, None, Path(), recent)

    tensors = [tensor(f"t{i}") for i in range(RecentFactors.capacity + 1)]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda i: tensors[0].open(), range(20)):
            pass
    assert loads == ["t0"]
    for each in tensors:
        each.open()
    tensors[0].open()
    assert loads == [*(f"t{i}" for i in range(RecentFactors.capacity + 1)), "t0"]


def test_the_same_stored_tensor_where_nothing_changes(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=4) | low_rank(UP, (24, 16), rank=4), r=4, lora_alpha=6)
    base = locate(str(models["base"]))
    found = apply_adapter(locate(str(adapter)), base)
    changed = {name for name, tensor in found.tensors.items() if tensor is not base.tensors[name]}
    assert changed == {f"{Q}.weight", f"{UP}.weight"}
    assert list(found.tensors) == list(base.tensors)
    values, factors = read_values(models["base"]), read_values(adapter)
    for module in (Q, UP):
        tensor = found.tensors[f"{module}.weight"]
        a, b = (factors[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        np.testing.assert_allclose(read_float32(tensor), merged(values[f"{module}.weight"], a, b, 1.5), rtol=1e-6, atol=1e-6)
        assert (tensor.dtype, tensor.nbytes) == (F32, 4 * tensor.size)
        assert {file.name for file in tensor.files} == {"model.safetensors", "adapter_model.safetensors", "adapter_config.json"}
    assert (found.config, found.model_type, found.warnings) == (base.config, "llama", ())
    assert found.nbytes == 4 * sum(tensor.size for tensor in factors.values())


@pytest.mark.parametrize(
    ("config", "module", "scale"),
    [
        ({"r": 4, "lora_alpha": 6}, Q, 1.5),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, Q, 3.0),
        ({"r": 9, "lora_alpha": 6, "rank_pattern": {"q_proj": 4}}, Q, 1.5),
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {r"^model\.layers\.0.*q_proj": 6, "q_proj": 3}}, Q, 1.5),
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {"proj": 99, "q_proj": 6}}, Q, 1.5),
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 99}}, Q, 0.25),
        ({"r": 4, "lora_alpha": 1, "alpha_pattern": {"up_proj|q_proj": 6}}, UP, 1.5),
        ({"lora_alpha": None, "rank_pattern": None}, Q, 1.0),
    ],
)
def test_scales(config: Mapping[str, Any], module: str, scale: float) -> None:
    assert AdapterConfig.model_validate({"peft_type": "LORA", **config}).scale(module) == scale


def test_whole_tensors_biases_and_embeddings(tmp_path: Path) -> None:
    config = llama_config(attention_bias=True)
    tensors = llama_tensors(config)
    base = write_checkpoint(tmp_path / "base", tensors, config, dtype="F32")
    rng = np.random.default_rng(0)
    norm, bias, added = (rng.standard_normal(16, np.float32) for _ in range(3))
    a, b = rng.standard_normal((3, 64), np.float32), rng.standard_normal((16, 3), np.float32)
    embedding, head = "model.embed_tokens", rng.standard_normal((64, 16), np.float32)
    stored = {
        f"{embedding}.base_layer.weight": tensors[f"{embedding}.weight"],
        f"{embedding}.lora_embedding_A": a,
        f"{embedding}.lora_embedding_B": b,
        "model.norm.weight": norm,
        "lm_head.modules_to_save.weight": head,
        f"{Q}.base_layer.bias": bias,
        **low_rank(Q, (16, 16), rank=3),
        f"{Q}.lora_B.bias": added,
    }
    found = apply(write_adapter(tmp_path / "lora", stored, r=3, lora_alpha=6, modules_to_save=["norm", "lm_head"]), base)
    values = {name: read_float32(tensor) for name, tensor in found.tensors.items()}
    np.testing.assert_array_equal(values["model.norm.weight"], norm)
    np.testing.assert_array_equal(values["lm_head.weight"], head)
    np.testing.assert_allclose(values[f"{Q}.bias"], bias + 2 * added, rtol=1e-6)
    expected = merged(tensors[f"{embedding}.weight"], a, b, 2.0, transposed=True)
    np.testing.assert_allclose(values[f"{embedding}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    base = make_models(tmp_path)["base"]
    embedding, head = np.ones((70, 16), np.float32), np.zeros((70, 16), np.float32)
    stored = {"model.embed_tokens.weight": embedding, "lm_head.weight": head, **low_rank(Q, (16, 16), rank=8)}
    found = apply(write_adapter(tmp_path / "lora", stored, modules_to_save=["embed_tokens", "lm_head"]), base)
    assert found.config["vocab_size"] == 70
    assert found.tensors["lm_head.weight"].shape == (70, 16)


def test_the_tokenizer_is_the_adapters_own_if_it_has_one(tmp_path: Path) -> None:
    base = make_models(tmp_path)["base"]
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8))
    assert (apply(adapter, base).folder, apply(adapter, base).folders) == (base, (adapter, base))
    write_tokenizer(adapter)
    assert apply(adapter, base).folder == adapter


@pytest.mark.parametrize(
    ("trained_on", "warned"),
    [
        ("base", False),
        ("org/base", False),
        ("/somewhere/BASE/", False),
        (None, False),
        ("org/base-instruct", True),
        ("other", True),
    ],
)
def test_another_base_is_a_warning(tmp_path: Path, trained_on: str | None, warned: bool) -> None:
    base = make_models(tmp_path)["base"]
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8), base_model_name_or_path=trained_on)
    message = f"math: the adapter was trained on {trained_on!r}; is {str(base)!r} the same model?"
    assert apply(adapter, base).warnings == ((message,) if warned else ())


def test_an_unknown_key_is_a_warning(tmp_path: Path) -> None:
    base = make_models(tmp_path)["base"]
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8), novelty=3, other_novelty=None)
    message = "math: adapter_config.json has 'novelty', which moerge does not know and ignores"
    assert apply(adapter, base).warnings == (message,)


@pytest.mark.parametrize(
    ("prefix_less", "module"),
    [(True, "transformer.h.0.mlp.c_fc"), (False, "h.0.mlp.c_fc"), (False, "transformer.h.0.mlp.c_fc")],
)
def test_names_with_and_without_the_models_prefix(tmp_path: Path, prefix_less: bool, module: str) -> None:
    name = "h.0.mlp.c_fc.weight" if prefix_less else "transformer.h.0.mlp.c_fc.weight"
    config = {"model_type": "novel", "vocab_size": 9}
    base = write_checkpoint(
        tmp_path / "base", {name: np.zeros((4, 6), np.float32), "x.weight": np.ones((2, 2), np.float32)}, config
    )
    found = apply(write_adapter(tmp_path / "lora", low_rank(module, (4, 6), rank=8)), base)
    assert [type(tensor).__name__ for tensor in found.tensors.values()] == ["LowRankTensor", "StoredTensor"]


@pytest.mark.parametrize(
    ("model_type", "module", "fan_in_fan_out", "transposed"),
    [
        ("gpt2", "transformer.h.0.attn.c_proj", False, True),
        ("gpt2", "lm_head", True, False),
        ("novel", "layers.0.dense", True, True),
        ("novel", "layers.0.dense", False, False),
    ],
)
def test_square_matrices(tmp_path: Path, model_type: str, module: str, fan_in_fan_out: bool, transposed: bool) -> None:
    zero = {f"{module}.weight": np.zeros((4, 4), np.float32)}
    base = write_checkpoint(tmp_path / "base", zero, {"model_type": model_type, "vocab_size": 9, "tie_word_embeddings": False})
    factors = low_rank(module, (4, 4), rank=2)
    adapter = write_adapter(tmp_path / "lora", factors, r=2, lora_alpha=2, fan_in_fan_out=fan_in_fan_out)
    change = factors[f"{module}.lora_B.weight"] @ factors[f"{module}.lora_A.weight"]
    value = read_float32(apply(adapter, base).tensors[f"{module}.weight"])
    np.testing.assert_allclose(value, change.T if transposed else change, atol=1e-7)


@pytest.mark.parametrize("config", [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {}])
def test_tied_whole_embeddings(tmp_path: Path, config: Mapping[str, Any]) -> None:
    base = make_models(tmp_path, tied=True)["base"]
    embedding = np.full((64, 16), 0.5, np.float32)
    stored = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding, **low_rank(Q, (16, 16), rank=8)}
    found = apply(write_adapter(tmp_path / "lora", stored, **config), base)
    assert "lm_head.weight" not in found.tensors
    np.testing.assert_array_equal(read_float32(found.tensors["model.embed_tokens.weight"]), embedding)


def test_a_zero_row_has_no_direction(tmp_path: Path) -> None:
    base, a = np.ones((3, 4), np.float32), np.zeros((1, 4), np.float32)
    base[1] = 0
    values = read_float32(computed(base, a, np.zeros((3, 1), np.float32), 1.0, False, np.ones(3, np.float32)))
    assert np.isnan(values[1]).all() and np.isfinite(values[[0, 2]]).all()


def test_settings_count_as_one_of_the_files(tmp_path: Path) -> None:
    """A plan made before alpha was changed is out of date."""
    import moerge

    models = make_models(tmp_path)
    adapter = write_adapter(tmp_path / "lora", low_rank(Q, (16, 16), rank=8))
    recipe = {"base": str(models["base"]), "experts": {"a": str(adapter), "b": str(models["math"])}}
    before = moerge.plan(recipe).fingerprint
    assert moerge.plan(recipe).fingerprint == before
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**config, "lora_alpha": 16})
    assert moerge.plan(recipe).fingerprint != before
