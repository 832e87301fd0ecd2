"""`moerge plan`: what it prints, and that it reads no tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moerge import InputError, merge, plan, verify
from moerge.checkpoint.header import StoredTensor, read_header
from tests.helpers.command import moerge
from tests.helpers.tiny import make_models, write_recipe


def _drop_data(models: dict[str, Path]) -> None:
    """Replace all tensor data by a hole in the file: the header stays, and nothing that was there can be read."""
    for folder in models.values():
        path = folder / "model.safetensors"
        size, start = path.stat().st_size, min(tensor.offset for tensor in read_header(path).values())
        os.truncate(path, start)
        os.truncate(path, size)


@pytest.mark.parametrize(
    "sections", [{"merge": {"method": "ties", "scope": "model"}}, {"moe": {"top_k": 1}}], ids=["dense", "moe"]
)
def test_a_plan_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, object]) -> None:
    models = make_models(tmp_path)
    recipe = write_recipe(tmp_path, **sections)
    before = moerge("plan", recipe, "--json", "--threads", 2)
    _drop_data(models)
    monkeypatch.setattr(StoredTensor, "open", lambda self: pytest.fail(f"{self.name} was opened"))
    assert moerge("plan", recipe, "--json", "--threads", 2) == before
    assert (before.code, before.err) == (0, "")


def test_a_plan_of_huge_models(tmp_path: Path) -> None:
    """Terabytes of holes: planning must not depend on the size of the data."""
    models = make_models(tmp_path, config={"vocab_size": 64})
    wide = 10**9
    for folder in models.values():
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": wide, "tie_word_embeddings": True}))
        _make_huge(folder / "model.safetensors", wide)
    summary = moerge("plan", write_recipe(tmp_path), "--json").json
    assert summary["parameters"] > wide * 16
    assert summary["output_bytes"] == 2 * summary["parameters"]
    assert summary["memory_bytes"] < 0.5 * 2**30


def _make_huge(path: Path, rows: int) -> None:
    from moerge.checkpoint.header import build_header

    tensors = [
        (name, tensor.dtype, (rows, 16) if "embed" in name else tensor.shape)
        for name, tensor in read_header(path).items()
        if name != "lm_head.weight"
    ]
    header, offsets = build_header(tensors, {})
    last = max(offsets, key=lambda name: offsets[name])
    size = offsets[last] + next(2 * int(_size(shape)) for name, _, shape in tensors if name == last)
    path.write_bytes(header)
    os.truncate(path, size)


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def test_the_summary_of_a_dense_merge(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, merge={"method": "ties", "overrides": [{"match": "norm", "method": "average"}]})
    summary = moerge("plan", recipe, "--json", "--threads", 1).json
    parameters = 2 * 64 * 16 + 2 * (16 * 16 * 2 + 8 * 16 * 2 + 3 * 16 * 24 + 2 * 16) + 16
    assert summary["parameters"] == parameters
    assert summary["output_bytes"] == 2 * parameters
    assert summary["input_bytes"] == 2 * (4 * parameters - 5 * 16)  # the average of norms does not read the base
    assert summary["operations"] == {"ties": 16, "average": 5}
    assert summary["models"] == {"base": "base", "math": "math", "code": "code", "knowledge": "knowledge"}
    assert (summary["model_type"], summary["experts"], summary["to_download"], summary["warnings"]) == ("llama", [], [], [])
    assert summary["notes"] == ["config from base, tokenizer and generation config from base"]


def test_the_summary_of_a_moe(tmp_path: Path) -> None:
    make_models(tmp_path)
    result = moerge("plan", write_recipe(tmp_path, moe={"top_k": 2}), "--json")
    assert result.json["experts"] == ["base", "math", "code", "knowledge"]
    assert result.json["model_type"] == "mixtral"
    assert result.json["operations"] == {"average": 15, "draw": 2, "copy": 24}
    assert result.json["warnings"] == ["the random router is untrained: the MoE mixes its experts blindly until it is fine-tuned"]


def test_what_a_person_sees(tmp_path: Path) -> None:
    make_models(tmp_path)
    result = moerge("plan", write_recipe(tmp_path, merge={"method": "ties", "density": 0.25}), "--threads", 2)
    assert result.code == 0
    for part in ("dense model", "ties", "density 0.25", "scale 0.3333", "reads ", "writes ", "2 threads", "config from base"):
        assert part in " ".join(result.out.split()), part


def test_the_source_of_config_and_tokenizer_is_named(tmp_path: Path) -> None:
    make_models(tmp_path)
    assert plan(write_recipe(tmp_path, config="code", tokenizer="math")).notes == (
        "config from code, tokenizer and generation config from math",
    )
    assert plan(write_recipe(tmp_path, base=None)).notes == ("config from math, tokenizer and generation config from math",)


def test_the_plan_says_what_the_merge_then_does(tmp_path: Path) -> None:
    make_models(tmp_path)
    planned = plan(write_recipe(tmp_path, moe={}))
    merge(planned, tmp_path / "out", max_shard_bytes=6000)
    written = {
        (tensor.name, tensor.dtype, tensor.shape)
        for path in (tmp_path / "out").glob("*.safetensors")
        for tensor in read_header(path).values()
    }
    assert written == {(output.name, output.dtype, output.shape) for output in planned.outputs}
    assert sum(1 for _ in (tmp_path / "out").glob("*.safetensors")) > 2


def test_values_too_large_for_float16_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    recipe = {
        "base": str(models["base"]),
        "experts": {"math": {"model": str(models["math"]), "weight": 1e9}},
        "merge": {"method": "task_arithmetic"},
        "dtype": "float16",
    }
    with pytest.raises(InputError, match="merged values are too large for float16: choose another 'dtype'"):
        merge(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    merge(recipe, tmp_path / "out", allow_nonfinite=True)
    assert any("NaN or infinity" in problem for problem in verify(tmp_path / "out").problems)
