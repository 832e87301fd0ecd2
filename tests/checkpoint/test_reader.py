"""Checkpoint folders that are incomplete, unreadable or hostile."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import (
    llama_config,
    llama_tensors,
    make_models,
    read_values,
    write_json,
    write_recipe,
    write_safetensors,
    write_tokenizer,
)

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def _index(**changes: Any) -> Callable[[Path], None]:
    """Change the weight_map of an index: {tensor: file}."""

    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        write_json(folder / INDEX, {**index, "weight_map": {**index["weight_map"], **changes}})

    return edit


def _stale_shard(folder: Path) -> None:
    write_safetensors(folder / SECOND, {"lm_head.weight": np.zeros((64, 16), np.float32), "old.weight": np.zeros(2, np.float32)})


BAD: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ["{f}/config.json is missing: a checkpoint folder needs it"]),
    "garbled config": (lambda f: (f / "config.json").write_text("{"), ["cannot read {f}/config.json as JSON: Expecting"]),
    "no number": (
        lambda f: (f / "config.json").write_text('{"rms_norm_eps": NaN}'),
        ["cannot read {f}/config.json as JSON: NaN is no number of JSON's"],
    ),
    "binary config": (lambda f: (f / "config.json").write_bytes(b"\x80"), ["cannot read {f}/config.json as JSON"]),
    "a list as config": (
        lambda f: (f / "config.json").write_text("[]"),
        ["{f}/config.json should hold a JSON object, not a list"],
    ),
    "nested config": (lambda f: (f / "config.json").write_text("[" * 100_000), ["cannot read {f}/config.json as JSON: maximum"]),
    "no weights": (lambda f: (f / INDEX).unlink(), ["code: {f} has neither model.safetensors nor " + INDEX]),
    "garbled index": (lambda f: (f / INDEX).write_text("{"), ["cannot read {f}/" + INDEX + " as JSON"]),
    "no weight_map": (lambda f: write_json(f / INDEX, {"metadata": {}}), ["{f}/" + INDEX + " has no usable 'weight_map'"]),
    "weight_map as list": (lambda f: write_json(f / INDEX, {"weight_map": []}), ["has no usable 'weight_map'"]),
    "numbers in weight_map": (lambda f: write_json(f / INDEX, {"weight_map": {"a": 1}}), ["has no usable 'weight_map'"]),
    "empty weight_map": (lambda f: write_json(f / INDEX, {"weight_map": {}}), ["code: {f} holds no tensors"]),
    "missing shard": (
        lambda f: (f / SECOND).unlink(),
        ["{f}/" + INDEX + " names " + SECOND + ", which is missing: fetch or copy"],
    ),
    "ghost": (_index(ghost=FIRST), ["tensor 'ghost' is listed in {f}/" + INDEX + " but is not in {f}/" + FIRST]),
    "stale shard": (
        _stale_shard,
        ["lies in {f}/" + FIRST, "and in {f}/" + SECOND, "the folder mixes shards of different checkpoints"],
    ),
    "torch's index": (
        lambda f: [(f / name).unlink() for name in (INDEX, FIRST, SECOND)] + [write_json(f / "pytorch_model.bin.index.json", {})],
        ["{f}/pytorch_model.bin.index.json has no usable 'weight_map'"],
    ),
}
OUTSIDE = ("../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "..\\x.safetensors", "a\0b")


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_folder_is_refused(tmp_path: Path, case: str) -> None:
    damage, parts = BAD[case]
    folder = make_models(tmp_path, shards=2)["code"]
    damage(folder)
    refuses(write_recipe(tmp_path), tmp_path / "out", *(part.replace("{f}", str(folder)) for part in parts))


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_that_names_files_elsewhere_is_refused_before_they_are_read(tmp_path: Path, file: str) -> None:
    folder = make_models(tmp_path, shards=2)["code"]
    write_safetensors(tmp_path / "x.safetensors", {"lm_head.weight": np.zeros((64, 16), np.float32)})
    _index(**{"lm_head.weight": file})(folder)
    refuses(write_recipe(tmp_path), tmp_path / "out", f"{folder / INDEX} names {file!r}, which is not a file in its own folder")


def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path: Path) -> None:
    folder = make_models(tmp_path, shards=2)["code"]
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"garbage")
    assert moerge("plan", write_recipe(tmp_path)).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_an_unreadable_file(tmp_path: Path, file: str) -> None:
    folder = make_models(tmp_path)["code"]
    (folder / file).chmod(0)
    refuses(write_recipe(tmp_path), tmp_path / "out", f"cannot read {folder / file}", "Permission denied")


def test_a_folder_in_the_place_of_a_file(tmp_path: Path) -> None:
    folder = make_models(tmp_path)["code"]
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refuses(write_recipe(tmp_path), tmp_path / "out", f"cannot read {folder / 'model.safetensors'}: Is a directory")


def test_a_missing_folder_suggests_its_neighbour(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, experts={"math": "./maths", "code": "code"})
    refuses(recipe, tmp_path / "out", f"math: there is no folder {tmp_path}/maths: did you mean 'math'?")


def test_a_misspelled_path_that_looks_like_a_hub_id_suggests_its_neighbour_too(tmp_path: Path) -> None:
    make_models(tmp_path / "models")
    recipe = write_recipe(tmp_path, base="models/base", experts={"math": "models/maths", "code": "models/code"})
    refuses(recipe, tmp_path / "out", f"math: there is no folder {tmp_path}/models/maths: did you mean 'math'?")


def test_the_command_that_converts_a_pickled_checkpoint_works(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs moerge[models]")
    pytest.importorskip("transformers", reason="needs moerge[models]")
    folder = make_models(tmp_path)["code"]
    tensors = llama_tensors(llama_config(), expert=7)
    (folder / "model.safetensors").unlink()
    torch.save(
        {
            name: torch.from_numpy(array).to(torch.bfloat16).mT.contiguous().mT if array.ndim == 2 else torch.from_numpy(array)
            for name, array in tensors.items()
        },
        folder / "pytorch_model.bin",
    )
    message = refuses(write_recipe(tmp_path), tmp_path / "out", f"code: {folder} holds pytorch_model.bin, a pickle")
    python, *arguments = shlex.split(message.partition("convert the checkpoint with: ")[2])
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    converted = Path(f"{folder}-safetensors")
    values = read_values(converted)
    assert values.keys() == tensors.keys()
    assert all(np.allclose(values[name], tensors[name], rtol=2**-8) for name in tensors)
    recipe = write_recipe(tmp_path, experts={"math": "math", "code": converted.name})
    result = moerge("merge", recipe, tmp_path / "out")
    assert result.code == 0, result.err


def test_tokens_of_a_sentencepiece_style_tokenizer(tmp_path: Path) -> None:
    """A vocabulary may be a list of [token, score]; ids are then positions."""
    models = make_models(tmp_path)
    pieces = [f"w{i}" for i in range(64)]
    for folder in models.values():
        write_tokenizer(folder, ["<unk>", "<s>", "</s>", *pieces[3:]])
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [[piece, -1.0] for piece in pieces]}
        if folder is models["code"]:
            tokenizer["model"]["vocab"][10][0] = "other"
        write_json(folder / "tokenizer.json", tokenizer)
    refuses(write_recipe(tmp_path), tmp_path / "out", 'base and code differ: only base has "w10"; only code has "other"; say')


def test_infinity_is_a_number_and_stays_one(tmp_path: Path) -> None:
    """Python's JSON and transformers read and write it, as the limit of a state-space model's time steps."""
    for folder in make_models(tmp_path, experts=("code",)).values():
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace("{", '{"time_step_limit": [0.0, Infinity],', 1))
    assert moerge("merge", write_recipe(tmp_path, experts=("code",)), tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["time_step_limit"] == [0.0, float("inf")]


def test_a_link_to_weights_that_are_gone(tmp_path: Path) -> None:
    weights = make_models(tmp_path)["code"] / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "blobs" / "gone")
    refuses(write_recipe(tmp_path), tmp_path / "out", str(weights), "is a link to", "gone: fetch the model again")
