"""The output folder: what may be replaced, what must not be touched, and a disk that is full."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
from pathlib import Path

import numpy as np
import pytest

from moerge.checkpoint.header import read_header
from moerge.checkpoint.staging import staging_folder
from moerge.merging.pipeline import merge
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import (
    edit_config,
    encode,
    llama_config,
    llama_tensors,
    make_models,
    read_tensors,
    read_values,
    write_checkpoint,
    write_recipe,
)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    make_models(tmp_path)
    return write_recipe(tmp_path)


def _fails(recipe: Path, out: Path, *parts: str, options: tuple[str, ...] = (), code: int = 2) -> None:
    """`merge` fails with this message, and neither the target nor its neighbours change."""
    before = sorted(out.parent.iterdir())
    result = moerge("merge", recipe, out, *options)
    assert (result.code, result.out, result.err.count("\n")) == (code, "", 1), result
    for part in parts:
        assert part in result.err, result.err
    assert sorted(out.parent.iterdir()) == before


def test_an_existing_folder_is_not_touched(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _fails(recipe, out, f"{out} already exists: choose another folder, or replace it with --force")
    (out / "notes.txt").write_text("mine")
    _fails(recipe, out, "already exists")
    _fails(recipe, out, "is not a checkpoint that moerge made, so --force does not replace it", options=("--force",))
    assert snapshot(out) == {"notes.txt": b"mine"}


def test_a_file_with_the_targets_name(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    _fails(recipe, tmp_path / "out", "already exists")
    _fails(recipe, tmp_path / "out", "is not a checkpoint that moerge made", options=("--force",))


def test_force_replaces_an_earlier_merge_and_nothing_of_it_stays(tmp_path: Path) -> None:
    make_models(tmp_path)
    out = tmp_path / "out"
    assert moerge("merge", write_recipe(tmp_path, moe={}), out, "--max-shard-size", "6kB").code == 0
    assert len(list(out.glob("*.safetensors"))) > 2
    average = write_recipe(tmp_path)
    assert moerge("merge", average, out).code == 2
    assert moerge("merge", average, out, "--force").code == 0
    assert moerge("merge", average, tmp_path / "fresh").code == 0
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_force_fills_an_empty_folder(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert moerge("merge", recipe, tmp_path / "out", "--force").code == 0
    assert (tmp_path / "out" / "moerge.json").exists()


def test_a_failed_force_keeps_the_earlier_merge(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert moerge("merge", recipe, out).code == 0
    before = snapshot(out)
    tensors = llama_tensors(llama_config(), expert=0)
    tensors["model.norm.weight"][3] = np.nan
    write_checkpoint(tmp_path / "math", tensors)
    _fails(recipe, out, "math: tensor 'model.norm.weight' holds NaN or infinity", options=("--force",))
    assert snapshot(out) == before


def test_the_output_must_not_lie_in_an_input(recipe: Path, tmp_path: Path) -> None:
    _fails(recipe, tmp_path / "math" / "out", "lies in math's own folder: choose another one")
    for options in ((), ("--force",)):
        _fails(recipe, tmp_path / "math", "lies in math's own folder", options=options)
    (tmp_path / "link").symlink_to(tmp_path / "code")
    _fails(recipe, tmp_path / "link" / "out", "lies in code's own folder")


def test_force_must_not_replace_a_folder_that_holds_an_input(tmp_path: Path) -> None:
    make_models(tmp_path)
    out = tmp_path / "out"
    assert moerge("merge", write_recipe(tmp_path), out).code == 0
    make_models(out / "inside")
    nested = write_recipe(tmp_path, base="out/inside/base", experts={"math": "math"})
    _fails(nested, out, f"base lies in the output {out} and would be replaced with it", options=("--force",))


def test_folders_on_the_way_are_made(recipe: Path, tmp_path: Path) -> None:
    assert moerge("merge", recipe, tmp_path / "a" / "b" / "out").code == 0
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["out"]


def test_a_target_that_is_too_long(recipe: Path, tmp_path: Path) -> None:
    result = moerge("merge", recipe, tmp_path / ("x" * 300))
    assert (result.code, "cannot be a folder: File name too long" in result.err) == (2, True)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(recipe: Path, tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        assert moerge("merge", recipe, tmp_path / "out").code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}


def _mixed(name: str) -> str:
    return "F32" if "norm" in name else "F16" if "q_proj" in name else "BF16"


def test_mixed_types_are_aligned_and_kept_where_they_are_copied(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype=_mixed)
    assert moerge("merge", write_recipe(tmp_path, moe={}), tmp_path / "out").code == 0
    tensors = read_header(tmp_path / "out" / "model.safetensors").values()
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in tensors)
    assert {tensor.dtype.name for tensor in tensors} == {"BF16", "F32"}  # what all models store wider stays wide
    for folder in models.values():
        narrow_first = {"flags": np.zeros(3, bool), "ids": np.arange(3)}  # in different shards, so that the order holds
        write_checkpoint(folder, {**narrow_first, **llama_tensors(llama_config())}, dtype=_mixed, shards=2)
        (folder / "model.safetensors").unlink()
    assert moerge("merge", write_recipe(tmp_path), tmp_path / "dense").code == 0
    tensors = read_header(tmp_path / "dense" / "model.safetensors").values()
    assert {tensor.dtype.name for tensor in tensors} == {"BF16", "F32", "I64", "BOOL"}
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in tensors)


@pytest.mark.parametrize(("dtype", "stored"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_output_type_is_one_rounding_of_the_float32_result(tmp_path: Path, dtype: str, stored: str) -> None:
    make_models(tmp_path, dtype=_mixed)
    assert moerge("merge", write_recipe(tmp_path, dtype="float32"), tmp_path / "wide").code == 0
    assert moerge("merge", write_recipe(tmp_path, dtype=dtype), tmp_path / "out").code == 0
    wide, narrow = read_values(tmp_path / "wide"), read_tensors(tmp_path / "out")
    for tensor in read_header(tmp_path / "out" / "model.safetensors").values():
        assert tensor.dtype.name == stored
        assert np.array_equal(narrow[tensor.name], encode(wide[tensor.name], tensor.dtype))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize(("sections", "name"), [({}, "model.norm.weight"), ({"moe": {}}, "model.layers.0.mlp.up_proj.weight")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_tensor_that_is_not_finite_is_named(
    tmp_path: Path, sections: dict[str, object], name: str, value: float, dtype: str
) -> None:
    models = make_models(tmp_path, dtype=dtype)
    tensors = llama_tensors(llama_config(), expert=1)
    tensors[name].flat[-1] = value
    write_checkpoint(models["code"], tensors, dtype=dtype)
    recipe, out = write_recipe(tmp_path, **sections), tmp_path / "out"
    refuses(recipe, out, f"code: tensor '{name}' holds NaN or infinity: repair or drop this expert", "--allow-nonfinite")
    result = moerge("merge", recipe, out, "--allow-nonfinite")
    assert result.code == 0
    assert f"warning: inputs with NaN or infinity went into the merge: code:{name}" in result.err
    assert json.loads((out / "moerge.json").read_text())["nonfinite_inputs"] == [f"code:{name}"]
    verified = moerge("verify", out)
    assert (verified.code, "holds NaN or infinity" in verified.err) == (2, True)


def test_no_space_is_seen_before_anything_is_written(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    refuses(recipe, tmp_path / "out", f"no space for {tmp_path / 'out'}: it needs ", code=1)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    out = tmp_path / "out"

    def full(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        result = moerge("merge", recipe, out)
    assert (result.code, result.out) == (1, "")
    assert result.err == f"moerge: no space left for {tmp_path}: free some and run the same command again with --resume\n"
    assert not out.exists()
    assert moerge("merge", recipe, out, "--resume").code == 0
    merge(recipe, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")
    assert not staging_folder(out).exists()


def test_a_failing_disk(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    result = moerge("merge", recipe, tmp_path / "out")
    assert (result.code, result.out) == (1, "")
    assert "Input/output error" in result.err and result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe, disk = write_recipe(tmp_path), tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        (disk / "filler").write_bytes(b"\0" * 57_000)
        refuses(recipe, disk / "out", f"no space for {disk / 'out'}", code=1)
        (disk / "filler").write_bytes(b"\0" * 45_000)  # enough for the tensors, not for what goes beside them
        result = moerge("merge", recipe, disk / "out")
        assert (result.code, "no space left" in result.err) == (1, True)
        assert sorted(path.name for path in disk.iterdir()) == [".out.moerge-partial", "filler"]
        (disk / "filler").unlink()
        assert moerge("merge", recipe, disk / "out", "--resume").code == 0
        merge(recipe, tmp_path / "fresh")
        assert snapshot(disk / "out") == snapshot(tmp_path / "fresh")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_an_edited_config_does_not_reach_an_earlier_plan(recipe: Path, tmp_path: Path) -> None:
    """What was planned is what is done, whatever happens to config.json in between."""
    from moerge import plan

    planned = plan(recipe)
    edit_config(tmp_path / "base", max_position_embeddings=7)
    merge(planned, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 128


def test_names_that_no_folder_can_have(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in {
        "/": "/ is no name for a folder: choose another",
        "dangling": "dangling is a link to something that is not there: remove it, or choose another folder",
        "file/deep/out": f"would lie in {tmp_path / 'file'}, which is a file: choose another folder",
        "x" * 240: f"the name {'x' * 40}... is too long for a folder: choose a shorter one",
    }.items():
        result = moerge("merge", recipe, tmp_path / name)
        assert (result.code, result.out) == (2, "") and message in result.err, result
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()
