"""`moerge verify` and `moerge inspect`: what they find, in folders that moerge made and in others."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from moerge import verify
from moerge.checkpoint.header import read_header
from moerge.merging.pipeline import merge
from tests.helpers.command import moerge
from tests.helpers.tiny import edit_config, llama_config, llama_tensors, make_models, write_checkpoint, write_recipe


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    make_models(tmp_path)
    merge(write_recipe(tmp_path, merge={"method": "ties"}), tmp_path / "out", max_shard_bytes=6000)
    return tmp_path / "out"


def _flip(folder: Path, name: str) -> Path:
    """Flip one bit of a tensor; the file it lies in."""
    for path in folder.glob("*.safetensors"):
        tensor = read_header(path).get(name)
        if tensor is not None:
            with open(path, "r+b") as file:
                file.seek(tensor.offset + tensor.nbytes // 2)
                byte = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte ^ 1]))
            return path
    raise AssertionError(name)


def test_an_intact_checkpoint(merged: Path) -> None:
    result = moerge("verify", merged)
    assert result.code == 0 and "moerge: " not in result.err
    assert result.out.split("\n")[0].startswith("21 tensors, 11.9 kB: all present, finite and equal to the manifest")
    found = moerge("verify", merged, "--json").json
    assert found == {
        "checkpoint": str(merged),
        "intact": True,
        "problems": [],
        "tensors": 21,
        "bytes": 11936,
        "notes": [],
        "compared_with_manifest": True,
    }
    assert moerge("verify", merged, "--quiet").out == ""


@pytest.mark.parametrize("threads", [1, 3])
def test_a_flipped_bit_is_found_in_its_tensor(merged: Path, threads: int) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    file = _flip(merged, name)
    result = moerge("verify", merged, "--threads", threads)
    message = f"tensor '{name}' in {file.name} is damaged: its bytes are not those that were merged"
    assert (result.code, result.err) == (2, f"moerge: {merged}: {message}\n")
    found = moerge("verify", merged, "--json")
    assert found.code == 2
    assert (found.json["intact"], found.json["problems"]) == (False, [message])


def test_every_tensor_and_file_is_watched(merged: Path) -> None:
    manifest = json.loads((merged / "moerge.json").read_text())
    for name in manifest["tensors"]:
        _flip(merged, name)
    for name in manifest["files"]:
        with open(merged / name, "ab") as file:
            file.write(b" ")
    problems = verify(merged).problems
    assert len(problems) == len(manifest["tensors"]) + len(manifest["files"])
    names = {"README.md", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(manifest["files"]) == names
    assert all(f"{name} was changed after the merge" in problems for name in names)


def test_a_truncated_shard(merged: Path) -> None:
    shard = sorted(merged.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    result = moerge("verify", merged)
    assert (result.code, f"{shard} is truncated: its header promises" in result.err) == (2, True)


def test_a_missing_shard(merged: Path) -> None:
    shard = sorted(merged.glob("*.safetensors"))[1]
    shard.unlink()
    result = moerge("verify", merged)
    assert (result.code, f"names {shard.name}, which is missing" in result.err) == (2, True)


def test_missing_and_foreign_tensors(tmp_path: Path) -> None:
    make_models(tmp_path)
    out = tmp_path / "out"
    merge(write_recipe(tmp_path), out)
    manifest, config = (out / "moerge.json").read_text(), json.loads((out / "config.json").read_text())
    tensors = llama_tensors(llama_config())
    del tensors["model.norm.weight"]
    write_checkpoint(out, {**tensors, "model.layers.0.extra": np.zeros(3, np.float32)}, config, tokenizer=False)
    (out / "moerge.json").write_text(manifest)
    problems = moerge("verify", out, "--json").json["problems"]
    for problem in (
        "tensor 'model.norm.weight' is missing",
        "tensor 'model.norm.weight' of the manifest is missing",
        "tensor 'model.layers.0.extra' is not in the manifest",
    ):
        assert problem in problems


def test_a_missing_file_and_a_changed_config(merged: Path) -> None:
    (merged / "tokenizer.json").unlink()
    edit_config(merged, rms_norm_eps=1e-5)
    result = moerge("verify", merged)
    assert result.code == 2
    assert sorted(result.err.splitlines()) == [
        f"moerge: {merged}: config.json was changed after the merge",
        f"moerge: {merged}: tokenizer.json is missing",
    ]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 99, "tensors": {}}'])
def test_a_damaged_manifest(merged: Path, text: str) -> None:
    (merged / "moerge.json").write_text(text)
    for command in ("verify", "inspect"):
        result = moerge(command, merged)
        assert (result.code, result.err.count("\n")) == (2, 1)
        assert str(merged / "moerge.json") in result.err


def test_a_checkpoint_of_someone_else(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    result = moerge("verify", models["math"])
    assert (result.code, result.err) == (0, "")
    assert "21 tensors, 11.9 kB: all present, finite (no manifest to compare with)" in result.out
    tensors = llama_tensors(llama_config())
    tensors["lm_head.weight"][1, 2] = np.inf
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8]
    write_checkpoint(models["math"], tensors)
    result = moerge("verify", models["math"], "--json")
    assert result.code == 2
    assert result.json["problems"] == [
        "tensor 'model.norm.weight' has shape [8], expected [16]",
        "tensor 'lm_head.weight' in model.safetensors holds NaN or infinity",
    ]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for command in ("verify", "inspect"):
        result = moerge(command, tmp_path / "nothing")
        assert (result.code, result.out) == (2, "")
        assert result.err == f"moerge: there is no folder {tmp_path / 'nothing'}: check the path\n"


def test_inspect_a_dense_model(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype=lambda name: "F32" if "norm" in name else "BF16", tied=True)
    found = moerge("inspect", models["math"], "--json").json
    assert (found["model_type"], found["family"], found["layers"], found["hidden_size"]) == ("llama", "llama", 2, 16)
    assert (found["tied_embeddings"], found["tokens"], found["made_by"]) == (True, 64, None)
    assert found["dtypes"] == {"F32": 5 * 16, "BF16": found["parameters"] - 5 * 16}
    roles = {role["role"]: (role["shape"], role["tensors"], role["parameters"]) for role in found["roles"]}
    assert roles["embedding"] == ([64, 16], 1, 1024)
    assert roles["layers.*.ffn.down"] == ([16, 24], 2, 768)
    assert roles["norm.final"] == ([16], 1, 16)
    assert sum(parameters for _, _, parameters in roles.values()) == found["parameters"]
    text = moerge("inspect", models["math"]).out
    for part in ("llama", "tied", "64 tokens", "layers.*.attention.q", "BF16", "F32"):
        assert part in text, part


def test_inspect_a_moe_that_moerge_made(tmp_path: Path) -> None:
    make_models(tmp_path)
    merge(write_recipe(tmp_path, moe={}), tmp_path / "out")
    found = moerge("inspect", tmp_path / "out", "--json").json
    assert (found["family"], found["made_by"]["experts"]) == ("mixtral", ["base", "math", "code", "knowledge"])
    assert found["made_by"]["recipe"]["moe"] == {}
    roles = {role["role"]: role["tensors"] for role in found["roles"]}
    assert (roles["layers.*.router"], roles["layers.*.ffn.*.gate"]) == (2, 8)
    text = moerge("inspect", tmp_path / "out").out
    for part in ("mixtral", "average of base, math, code, knowledge", "0 base, 1 math, 2 code, 3 knowledge"):
        assert part in text, part


def test_inspect_an_unknown_family(tmp_path: Path) -> None:
    config = {"model_type": "novel", "hidden_size": [4, 8], "num_attention_heads": "many"}
    write_checkpoint(tmp_path / "x", {"blocks.0.w": np.zeros((2, 3), np.float32), "ids": np.arange(3)}, config, tokenizer=False)
    found = moerge("inspect", tmp_path / "x", "--json").json
    assert (found["model_type"], found["family"], found["parameters"], found["tokens"]) == ("novel", None, 9, None)
    assert [role["role"] for role in found["roles"]] == ["(no role) ids", "(no role) blocks.*.w"]
    assert "novel (unknown to moerge)" in moerge("inspect", tmp_path / "x").out
    assert moerge("verify", tmp_path / "x").code == 0


def test_inspect_and_verify_refuse_a_garbled_config(tmp_path: Path) -> None:
    folder = make_models(tmp_path)["math"]
    edit_config(folder, num_attention_heads="4")
    for command in ("inspect", "verify"):
        result = moerge(command, folder)
        assert result.code == 2
        assert "num_attention_heads should be a positive whole number, not '4'" in result.err


def test_inspect_reads_no_tensor(tmp_path: Path) -> None:
    folder = make_models(tmp_path)["math"]
    before = moerge("inspect", folder, "--json")
    path = folder / "model.safetensors"
    size, start = path.stat().st_size, min(tensor.offset for tensor in read_header(path).values())
    os.truncate(path, start)
    os.truncate(path, size)
    assert moerge("inspect", folder, "--json") == before
