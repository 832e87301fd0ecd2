"""The same recipe, inputs and seed give the same bytes, whatever the threads and however the tensors lie in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.checkpoint.header import read_header
from moerge.checkpoint.staging import assign_shards
from moerge.merging.pipeline import merge, plan
from tests.helpers.tiny import make_models, read_tensors, write_recipe

pytestmark = pytest.mark.slow

RECIPES: dict[str, dict[str, Any]] = {
    "average": {},
    "linear": {"merge": {"method": "linear"}},
    "ties": {"merge": {"method": "ties", "density": 0.3}},
    "ties over the model": {"merge": {"method": "ties", "density": 0.3, "scope": "model"}},
    "dare": {"merge": {"method": "dare", "density": 0.5, "seed": 11}},
    "slerp": {"experts": ("math", "code"), "merge": {"method": "slerp"}},
    "moe": {"merge": {"method": "task_arithmetic"}, "moe": {"router": {"seed": 5}}},
}
WIDE = {"vocab_size": 9000, "hidden_size": 128, "intermediate_size": 96, "tie_word_embeddings": True}
"""An embedding of more than a million elements: several chunks, so that threads share one tensor."""


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    make_models(folder, config=WIDE)
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_threads_do_not_matter(wide: Path, tmp_path: Path, name: str) -> None:
    recipe = write_recipe(wide, **RECIPES[name])
    for threads in (1, 2, 4):
        merge(recipe, tmp_path / str(threads), threads=threads)
    one = _snapshot(tmp_path / "1")
    assert _snapshot(tmp_path / "2") == one
    assert _snapshot(tmp_path / "4") == one


@pytest.mark.parametrize("name", RECIPES)
def test_shards_do_not_matter(tmp_path: Path, name: str) -> None:
    for shards in (1, 3):
        make_models(tmp_path / str(shards), shards=shards)
        recipe = write_recipe(tmp_path / str(shards), **RECIPES[name])
        merge(recipe, tmp_path / f"from{shards}")
    merge(recipe, tmp_path / "small", max_shard_bytes=5000)
    assert (tmp_path / "from1" / "model.safetensors").read_bytes() == (tmp_path / "from3" / "model.safetensors").read_bytes()
    whole, small = read_tensors(tmp_path / "from1"), read_tensors(tmp_path / "small")
    assert whole.keys() == small.keys()
    assert all(np.array_equal(whole[tensor], small[tensor]) for tensor in whole)
    manifests = [json.loads((tmp_path / out / "moerge.json").read_text()) for out in ("from1", "from3", "small")]
    for manifest in manifests:  # what is asked of --resume, of which the largest shard is a part
        del manifest["plan"], manifest["manifest_digest"]
    assert manifests[0] == manifests[1] == manifests[2]  # digests do not depend on files either


def test_shards_are_within_the_limit_and_their_index_is_right(tmp_path: Path) -> None:
    make_models(tmp_path)
    planned = plan(write_recipe(tmp_path))
    limit = 3000
    merge(planned, tmp_path / "out", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    stored = {file: read_header(tmp_path / "out" / file) for file in files}
    assert index["weight_map"] == {name: file for file, tensors in stored.items() for name in tensors}
    assert index["metadata"]["total_size"] == planned.output_bytes
    for tensors in stored.values():
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
    ordered = [output.name for group in assign_shards(planned.outputs, limit).values() for output in group]
    assert ordered == [output.name for output in planned.outputs]


def test_what_the_ecosystem_loads(tmp_path: Path) -> None:
    """Shards, index and types as the safetensors library and transformers read them."""
    torch = pytest.importorskip("torch", reason="needs moerge[models]")
    transformers = pytest.importorskip("transformers", reason="needs moerge[models]")
    library = pytest.importorskip("safetensors", reason="needs moerge[models]")
    make_models(tmp_path, dtype=lambda name: "F32" if "norm" in name else "BF16")
    merge(write_recipe(tmp_path), tmp_path / "out", max_shard_bytes=3000)
    ours = read_tensors(tmp_path / "out")
    theirs = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with library.safe_open(path, "pt") as file:
            theirs |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert ours.keys() == theirs.keys()
    assert {str(tensor.dtype) for tensor in theirs.values()} == {"torch.bfloat16", "torch.float32"}  # what all have wider stays
    assert all(theirs[name].view(torch.uint8).numpy().tobytes() == array.tobytes() for name, array in ours.items())
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    state = model.state_dict()
    assert all(torch.equal(state[name], theirs[name].to(state[name].dtype)) for name in ours)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "out")) == 64


def test_no_path_of_this_machine_is_written(tmp_path: Path) -> None:
    make_models(tmp_path)
    merge(write_recipe(tmp_path), tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name
