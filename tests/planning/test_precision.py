"""Tensors stored wider than the rest: kept where all models have them so, or by an override, and never by an explicit dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.errors import InputError
from tests.helpers import tiny

_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
_EXPERTS = ("a", "b")


def _models(folder: Path, *, wide: tuple[str, ...] = ("base", *_EXPERTS), kind: str = "mystery") -> None:
    """bfloat16 models; of those that are `wide` the router's bias is float32 and lies where bfloat16 has a few values."""
    config = tiny.llama_config(model_type=kind)
    for seed, name in enumerate(("base", *_EXPERTS)):
        bias = 6.8 + 0.25 * np.random.default_rng(seed).random(64, np.float32)
        tensors = {**tiny.llama_tensors(config, seed=seed), _BIAS: bias}
        stored = "F32" if name in wide else "BF16"
        tiny.write_checkpoint(folder / name, tensors, config, dtype=lambda name, s=stored: s if name == _BIAS else "BF16")  # type: ignore[misc]


def _merged(folder: Path, **sections: Any) -> tuple[dict[str, np.ndarray], moerge.Plan]:
    plan = moerge.plan(tiny.write_recipe(folder, experts=_EXPERTS, **sections))
    moerge.merge(plan, folder / "out", threads=1)
    return tiny.read_tensors(folder / "out"), plan


def test_what_all_models_store_in_float32_is_merged_in_float32(tmp_path: Path) -> None:
    _models(tmp_path)
    found, plan = _merged(tmp_path)
    values = [tiny.read_values(tmp_path / name)[_BIAS].astype(np.float64) for name in _EXPERTS]
    assert found[_BIAS].dtype == np.float32 and len(np.unique(found[_BIAS])) == 64
    np.testing.assert_allclose(found[_BIAS], np.mean(values, axis=0), rtol=1e-7)
    assert {str(tensor.dtype) for name, tensor in found.items() if name != _BIAS} == {"uint16"}
    assert [note for note in plan.notes if "e_score_correction_bias" in note and "float32" in note]
    assert moerge.verify(tmp_path / "out").problems == ()


def test_a_copy_keeps_its_bytes(tmp_path: Path) -> None:
    _models(tmp_path)
    found, _ = _merged(tmp_path, merge={"method": "passthrough", "model": "a"})
    for name, stored in tiny.read_tensors(tmp_path / "a").items():
        assert found[name].dtype == stored.dtype and found[name].tobytes() == stored.tobytes(), name


def test_one_model_that_stores_it_narrow_decides(tmp_path: Path) -> None:
    _models(tmp_path, wide=("base", "a"))
    found, plan = _merged(tmp_path)
    assert found[_BIAS].dtype == np.uint16
    assert [note for note in plan.notes if "e_score_correction_bias" in note and "bfloat16" in note]


def test_an_explicit_dtype_converts_everything_and_says_what_that_costs(tmp_path: Path) -> None:
    _models(tmp_path)
    found, plan = _merged(tmp_path, dtype="bfloat16")
    assert {str(tensor.dtype) for tensor in found.values()} == {"uint16"}
    assert [note for note in plan.notes if "e_score_correction_bias" in note and "bfloat16" in note]


@pytest.mark.parametrize("match", [_BIAS, "*.e_score_correction_bias"])
def test_an_override_gives_a_dtype(tmp_path: Path, match: str) -> None:
    _models(tmp_path, wide=("base", "a"))
    merge = {"method": "average", "overrides": [{"match": match, "dtype": "float32"}]}
    found, _ = _merged(tmp_path, merge=merge, dtype="bfloat16")
    values = [tiny.read_values(tmp_path / name)[_BIAS].astype(np.float64) for name in _EXPERTS]
    np.testing.assert_allclose(found[_BIAS], np.mean(values, axis=0), rtol=1e-7)


def test_an_override_gives_a_role_a_dtype_also_where_it_is_copied_or_drawn(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, dtype="BF16")
    overrides = [{"match": "router", "dtype": "float32"}, {"match": "ffn.down", "dtype": "float32"}]
    recipe = tiny.write_recipe(tmp_path, merge={"method": "average", "overrides": overrides}, moe={"top_k": 2})
    moerge.merge(recipe, tmp_path / "out", threads=1)
    for name, stored in tiny.read_tensors(tmp_path / "out").items():
        wide = ".gate." in name or ".w2." in name
        assert stored.dtype == (np.float32 if wide else np.uint16), name


def test_tensors_of_one_type_stay_as_they_were(tmp_path: Path) -> None:
    tiny.make_models(tmp_path, dtype="BF16")
    plan = moerge.plan(tiny.write_recipe(tmp_path, merge={"method": "ties"}))
    assert {output.dtype.name for output in plan.outputs} == {"BF16"}
    assert not [note for note in plan.notes if "wider" in note or "precision" in note]


def test_a_dtype_that_is_none_names_its_key(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    merge = {"method": "average", "overrides": [{"match": "norm", "dtype": "float8"}]}
    with pytest.raises(InputError, match=r"overrides\[0\]\.dtype"):
        moerge.plan(tiny.write_recipe(tmp_path, merge=merge))
