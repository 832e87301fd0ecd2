"""Tensors without a transformers model: files, and folders of diffusion models, encoders and heads, merged by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.checkpoint.locate import locate
from moerge.errors import InputError
from tests.helpers.command import moerge as command
from tests.helpers.tiny import make_models, read_values, write_json, write_safetensors

NAMES = ("base", "a", "b")
SHAPES = {"down.0.conv.weight": (4, 3, 3, 3), "down.0.conv.bias": (4,), "mid.attn.to_q.weight": (8, 8), "scale": ()}


def tensors(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(NAMES.index(name))
    base = np.random.default_rng(9)
    drawn = {key: base.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
    return {key: value + 0.1 * rng.standard_normal(value.shape).astype(np.float32) for key, value in drawn.items()}


def recipe(models: Mapping[str, Any], **merge: Any) -> dict[str, Any]:
    experts = {name: str(path) for name, path in models.items() if name != "base"}
    merge = merge or {"method": "task_arithmetic", "scale": 0.5}
    return {"base": str(models["base"]), "experts": experts, "merge": merge}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    for name in NAMES:
        write_safetensors(tmp_path / f"{name}.safetensors", tensors(name), dtype="F32")
    return {name: tmp_path / f"{name}.safetensors" for name in NAMES}


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    for name in NAMES:
        (tmp_path / name).mkdir()
        write_safetensors(tmp_path / name / "diffusion_pytorch_model.safetensors", tensors(name), dtype="F32")
        write_json(tmp_path / name / "config.json", {"_class_name": "UNet2DConditionModel", "sample_size": 8})
    return {name: tmp_path / name for name in NAMES}


def summed(scale: float = 0.5) -> dict[str, np.ndarray]:
    base, a, b = (tensors(name) for name in NAMES)
    return {key: base[key] + scale * (a[key] - base[key] + b[key] - base[key]) for key in base}


def check(folder: Path, wanted: Mapping[str, np.ndarray]) -> None:
    merged = read_values(folder)
    assert merged.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(merged[key], value, atol=1e-6, err_msg=key)


def test_files(files: dict[str, Path], tmp_path: Path) -> None:
    result = moerge.merge(recipe(files), tmp_path / "out")
    check(tmp_path / "out", summed())
    assert not (tmp_path / "out" / "config.json").exists()
    assert any("no config.json of a transformers model" in warning for warning in result.plan.warnings)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "transformers" not in card.partition("## Warnings")[0] and "safetensors.torch.load_file" in card
    assert command("verify", tmp_path / "out", "--quiet").code == 0
    assert command("inspect", tmp_path / "out").code == 0
    assert moerge.merge(recipe(files), tmp_path / "out", resume=True).was_complete


def test_methods_by_pattern(files: dict[str, Path], tmp_path: Path) -> None:
    overrides = [{"match": "*.bias", "method": "passthrough", "model": "a"}, {"match": "down.*.conv.weight", "scale": 0.0}]
    merge = {"method": "task_arithmetic", "scale": 0.5, "overrides": overrides}
    moerge.merge(recipe(files, **merge), tmp_path / "out")
    wanted = summed()
    wanted |= {"down.0.conv.bias": tensors("a")["down.0.conv.bias"], "down.0.conv.weight": tensors("base")["down.0.conv.weight"]}
    check(tmp_path / "out", wanted)


def test_whole_matrices_and_magnitudes(files: dict[str, Path], tmp_path: Path) -> None:
    arrays = [tensors(name) for name in NAMES]
    for method, settings in (("ties", {"density": 0.5}), ("iso_c", {}), ("della", {"density": 0.5})):
        moerge.merge(recipe(files, method=method, **settings), tmp_path / method)
        names = ["a", "b"]
        kept = moerge.merge_state_dicts(arrays[0], dict(zip(names, arrays[1:], strict=True)), method=method, **settings)
        check(tmp_path / method, kept)


def test_a_diffusion_model_keeps_its_names_and_config(folders: dict[str, Path], tmp_path: Path) -> None:
    moerge.merge(recipe(folders), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"_class_name": "UNet2DConditionModel", "sample_size": 8}
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").exists()
    check(tmp_path / "out", summed())
    assert command("verify", tmp_path / "out", "--quiet").code == 0
    moerge.merge(recipe(folders), tmp_path / "shards", max_shard_bytes=300)
    index = json.loads((tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(SHAPES)
    assert command("verify", tmp_path / "shards", "--quiet").code == 0
    again = recipe({**folders, "base": tmp_path / "shards"})
    moerge.merge(again, tmp_path / "again")


def test_a_file_of_mergekit_pytorch(files: dict[str, Path], tmp_path: Path) -> None:
    foreign = {
        "models": [{"model": str(files["a"])}, {"model": str(files["b"]), "parameters": {"weight": 0.5}}],
        "base_model": str(files["base"]),
        "merge_method": "task_arithmetic",
        "parameters": {"weight": [{"filter": "attn", "value": 0.25}, {"value": 1}]},
        "dtype": "float32",
    }
    moerge.merge(foreign, tmp_path / "out")
    base, a, b = (tensors(name) for name in NAMES)
    weights = {key: 0.25 if "attn" in key else 1.0 for key in base}
    check(tmp_path / "out", {key: base[key] + weights[key] * (a[key] - base[key]) + 0.5 * (b[key] - base[key]) for key in base})


def test_a_tensor_that_a_file_lacks(files: dict[str, Path], tmp_path: Path) -> None:
    own = tensors("b")
    own.pop("down.0.conv.bias")
    write_safetensors(files["b"], own, dtype="F32")
    with pytest.raises(InputError, match=r"'down\.0\.conv\.bias'"):
        moerge.plan(recipe(files))


def test_a_tensor_of_another_shape(files: dict[str, Path]) -> None:
    write_safetensors(files["b"], {**tensors("b"), "scale": np.zeros(2, np.float32)}, dtype="F32")
    with pytest.raises(InputError, match=r"'scale'.*\[2\]"):
        moerge.plan(recipe(files))


def test_a_folder_of_several_files(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3 safetensors files and no index \(a\.safetensors, b\.safetensors, base"):
        moerge.plan({**recipe(files), "base": str(tmp_path)})


def test_a_model_without_its_config(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=("math",))
    (models["math"] / "config.json").unlink()
    with pytest.raises(InputError, match=r"math/config\.json is missing"):
        moerge.plan({"base": str(models["base"]), "experts": {"math": str(models["math"])}})
    with pytest.raises(InputError, match="is a file: name the checkpoint's folder"):
        locate(str(models["base"] / "model.safetensors"))


def test_it_is_no_mixture(files: dict[str, Path]) -> None:
    with pytest.raises(InputError):
        moerge.plan({**recipe(files, method="average"), "moe": {}})
