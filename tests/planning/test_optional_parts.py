"""Tensors that not all models have: whose they are by default, what `parts` says, and what is damage and no part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.errors import InputError
from tests.helpers import tiny

_EXPERTS = ("a", "b")
_MTP = ("mtp.fc.weight", "mtp.layers.0.norm.weight")
_BEYOND = ("model.layers.2.eh_proj.weight", "model.layers.2.mlp.up_proj.weight")


def _write(
    folder: Path, more: tuple[str, ...] = (), *, seed: int = 0, kind: str = "deepseek_v3", drop: str = ""
) -> dict[str, Any]:
    """A two-layer model with `more` tensors."""
    config = tiny.llama_config(model_type=kind)
    numbers = np.random.default_rng(seed)
    tensors = tiny.llama_tensors(config, seed=seed) | {name: numbers.random(4, np.float32) for name in more}
    tensors.pop(drop, None)
    tiny.write_checkpoint(folder, tensors, config, dtype="F32")
    return tensors


def _merge(folder: Path, **sections: Any) -> tuple[dict[str, np.ndarray], moerge.Plan]:
    plan = moerge.plan(tiny.write_recipe(folder, experts=_EXPERTS, merge={"method": "average"}, **sections))
    moerge.merge(plan, folder / "out", threads=1)
    return tiny.read_values(folder / "out"), plan


@pytest.mark.parametrize("names", [_MTP, _BEYOND], ids=["root", "layer"])
@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_by_default_they_are_the_configs_models(tmp_path: Path, names: tuple[str, ...], kind: str) -> None:
    base = _write(tmp_path / "base", names, kind=kind)
    for seed, name in enumerate(_EXPERTS, 1):
        _write(tmp_path / name, seed=seed, kind=kind)
    found, plan = _merge(tmp_path)
    for name in names:
        np.testing.assert_array_equal(found[name], base[name])
    assert len([text for text in plan.warnings if text.startswith("mtp: 2 tensors") and "base" in text]) == 1


def test_what_only_another_model_has_is_left_out_with_the_way_to_take_it(tmp_path: Path) -> None:
    written = {name: _write(tmp_path / name, _MTP if name == "a" else (), seed=i) for i, name in enumerate(("base", *_EXPERTS))}
    found, plan = _merge(tmp_path)
    assert not found.keys() & set(_MTP) and [text for text in plan.warnings if "parts: {mtp: a}" in text]
    moerge.merge(tiny.write_recipe(tmp_path, experts=_EXPERTS, parts={"mtp": "a"}), tmp_path / "with", threads=1)
    taken = tiny.read_values(tmp_path / "with")
    assert all(np.array_equal(taken[name], written["a"][name]) for name in _MTP)


@pytest.mark.parametrize("pattern", ["mtp", "mtp.*", "mtp.layers", "mtp.layers.0.norm.weight"])
def test_parts_decide_even_where_all_models_have_them(tmp_path: Path, pattern: str) -> None:
    written = {name: _write(tmp_path / name, _MTP, seed=i) for i, name in enumerate(("base", *_EXPERTS))}
    found, plan = _merge(tmp_path, parts={pattern: "b"})
    mean = (written["a"][_MTP[0]].astype(np.float64) + written["b"][_MTP[0]]) / 2
    np.testing.assert_array_equal(found[_MTP[1]], written["b"][_MTP[1]])
    np.testing.assert_allclose(found[_MTP[0]], written["b"][_MTP[0]] if pattern[:5] in ("mtp", "mtp.*") else mean, rtol=1e-6)
    assert not [text for text in plan.warnings if "mtp" in text]


def test_a_part_can_be_dropped(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *_EXPERTS)):
        _write(tmp_path / name, _MTP if name != "a" else (), seed=seed)
    found, plan = _merge(tmp_path, parts={"mtp": "drop"})
    assert not found.keys() & set(_MTP) and not [text for text in plan.warnings if "mtp" in text]


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"vision": "base"}, ["'vision' is no part", "mtp"]),
        ({"mtp": "c"}, ["parts.mtp", "'c' is not a model"]),
        ({"mtp": "a"}, ["a has no tensor", "mtp"]),
    ],
)
def test_parts_that_cannot_be_taken(tmp_path: Path, parts: dict[str, str], words: list[str]) -> None:
    for seed, name in enumerate(("base", *_EXPERTS)):
        _write(tmp_path / name, _MTP if name == "base" else (), seed=seed)
    with pytest.raises(InputError) as raised:
        moerge.plan(tiny.write_recipe(tmp_path, experts=_EXPERTS, parts=parts))
    assert all(word in str(raised.value) for word in words), raised.value


def test_a_tensor_that_the_model_needs_cannot_be_dropped(tmp_path: Path) -> None:
    for name in ("base", *_EXPERTS):
        _write(tmp_path / name, kind="llama")
    with pytest.raises(InputError, match="'norm' drops tensor"):
        moerge.plan(tiny.write_recipe(tmp_path, experts=_EXPERTS, parts={"norm": "drop"}))


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_lost_tensor_is_no_part(tmp_path: Path, name: str) -> None:
    for model in ("base", *_EXPERTS):
        _write(tmp_path / model, drop=name if model == "a" else "")
    with pytest.raises(InputError, match="is in base, b but not in a") as raised:
        moerge.plan(tiny.write_recipe(tmp_path, experts=_EXPERTS))
    assert f"parts: {{'{name}': base}}" in str(raised.value)
    moerge.plan(tiny.write_recipe(tmp_path, experts=_EXPERTS, parts={name: "base"}))


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: f"_orig_mod.{name}", ["_orig_mod."]),
        (lambda name: f"module.{name}", ["module."]),
        (lambda name: name.removeprefix("model."), ["model.", "lack"]),
        (lambda name: f"language.{name}", ["language.", "have"]),
    ],
)
@pytest.mark.parametrize("kind", ["deepseek_v3", "llama"])
def test_a_prefix_is_read_and_named(tmp_path: Path, rename: Any, words: list[str], kind: str) -> None:
    written = {}
    for seed, name in enumerate(("base", *_EXPERTS)):
        config = tiny.llama_config(model_type=kind)
        written[name] = tiny.llama_tensors(config, seed=seed)
        stored = {rename(tensor) if name == "a" else tensor: values for tensor, values in written[name].items()}
        tiny.write_checkpoint(tmp_path / name, stored, config, dtype="F32")
    found, plan = _merge(tmp_path)
    for name in written["base"]:
        np.testing.assert_allclose(found[name], (written["a"][name] + written["b"][name]) / 2, rtol=1e-6)
    assert [text for text in plan.warnings if text.startswith("a: ") and all(word in text for word in words)]


def test_names_that_tensorflow_left_behind(tmp_path: Path) -> None:
    config = {"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 1, "architectures": ["BertModel"]}
    values = {name: np.arange(4, dtype=np.float32) + i for i, name in enumerate(("base", *_EXPERTS))}
    for name in ("base", *_EXPERTS):
        weight, bias = ("gamma", "beta") if name == "base" else ("weight", "bias")
        tensors = {f"embeddings.LayerNorm.{weight}": values[name], f"embeddings.LayerNorm.{bias}": values[name]}
        ids = {"embeddings.position_ids": np.arange(4)} if name == "base" else {}
        tiny.write_checkpoint(tmp_path / name, tensors | ids, config, dtype="F32")
    found, _ = _merge(tmp_path)
    assert found.keys() == {"embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias", "embeddings.position_ids"}
    np.testing.assert_array_equal(found["embeddings.LayerNorm.weight"], (values["a"] + values["b"]) / 2)
