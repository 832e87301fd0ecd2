"""Pickled weights are read without unpickling: as torch loads them, and nothing in a hostile file runs."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.checkpoint.pickled import UnreadablePickle, layouts_of, read_pickled
from moerge.checkpoint.reader import open_folder
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import (
    llama_config,
    llama_tensors,
    make_models,
    read_tensors,
    read_values,
    write_json,
    write_recipe,
    write_safetensors,
)

torch = pytest.importorskip("torch", reason="needs torch to write them")


def values(file: Path) -> dict[str, np.ndarray]:
    return {
        name: tensor.open().read(0, np.empty(tensor.size, tensor.dtype.storage)).reshape(tensor.shape)
        for name, tensor in read_pickled(file).items()
    }


KINDS = ["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_type_is_what_torch_loads(tmp_path: Path, protocol: int) -> None:
    shared = torch.randn(10, generator=torch.Generator().manual_seed(0))
    state = OrderedDict({kind: (torch.arange(6).reshape(2, 3) % 5).to(getattr(torch, kind)) for kind in KINDS})
    state |= {"a part": shared[3:7], "a scalar": torch.tensor(2.5), "nothing": torch.zeros(0, 3), "row": torch.randn(1, 4).T}
    state["parameter"] = torch.nn.Parameter(torch.ones(3))
    torch.save(state, tmp_path / "a.bin", pickle_protocol=protocol)
    loaded = torch.load(tmp_path / "a.bin", weights_only=protocol == 2)
    found = values(tmp_path / "a.bin")
    assert found.keys() == loaded.keys()
    for name, tensor in loaded.items():
        expected = tensor.detach()
        expected = (expected.view(torch.uint16) if expected.dtype is torch.bfloat16 else expected).numpy()
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_merging_pickles_is_merging_what_they_hold(tmp_path: Path, sharded: bool) -> None:
    folder = make_models(tmp_path, experts=["a"], dtype="F32")["a"]
    assert moerge("merge", write_recipe(tmp_path, experts=["a"]), tmp_path / "before", "--quiet").code == 0
    state = {name: torch.from_numpy(value) for name, value in read_values(folder).items()}
    (folder / "model.safetensors").unlink()
    names = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": names[:5], "pytorch_model-00002-of-00002.bin": names[5:]} if sharded else {}
    for file, part in (parts or {"pytorch_model.bin": names}).items():
        torch.save({name: state[name] for name in part}, folder / file)
    if sharded:
        weight_map = {name: file for file, part in parts.items() for name in part}
        write_json(folder / "pytorch_model.bin.index.json", {"metadata": {}, "weight_map": weight_map})
    assert moerge("merge", write_recipe(tmp_path, experts=["a"]), tmp_path / "out", "--quiet").code == 0
    before, after = read_tensors(tmp_path / "before"), read_tensors(tmp_path / "out")
    assert all(np.array_equal(before[name], after[name]) for name in before) and before.keys() == after.keys()


def test_float64_is_merged_in_float32(tmp_path: Path) -> None:
    folders = make_models(tmp_path, experts=["a"], dtype="F32")
    state = {name: torch.from_numpy(value).double() * 1.0000000001 for name, value in read_values(folders["a"]).items()}
    (folders["a"] / "model.safetensors").unlink()
    torch.save(state, folders["a"] / "pytorch_model.bin")
    recipe = write_recipe(tmp_path, base=None, experts={"a": "a"}, merge={"method": "average"})
    result = moerge("merge", recipe, tmp_path / "out", "--json")
    assert result.code == 0 and any("float64 are read as float32" in note for note in result.json["notes"]), result.err
    merged = read_values(tmp_path / "out")
    assert all(np.array_equal(merged[name], value.float().numpy()) for name, value in state.items())


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def hostile(folder: Path) -> dict[str, Any]:
    mark = folder / "it-ran"
    return {
        "os.system": Bomb(os.system, f"touch {mark}"),
        "eval": Bomb(eval, f"open({str(mark)!r}, 'w')"),
        "exec": Bomb(exec, f"open({str(mark)!r}, 'w')"),
        "open": Bomb(open, str(mark), "w"),
        "getattr": Bomb(getattr, os, "system"),
        "a class of torch": Bomb(torch.Size, (3,)),
        "a tensor from elsewhere": Bomb(torch.hub.load_state_dict_from_url, "http://127.0.0.1/x"),
    }


@pytest.mark.parametrize("kind", ["os.system", "eval", "exec", "open", "getattr", "a class of torch", "a tensor from elsewhere"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_hostile_file_runs(tmp_path: Path, kind: str, protocol: int) -> None:
    folder = make_models(tmp_path, experts=["a"])["a"]
    (folder / "model.safetensors").unlink()
    bomb = hostile(tmp_path)[kind] if kind != "getattr" else Bomb(getattr, "text", "upper")
    torch.save({"a.weight": torch.ones(2), "b": bomb}, folder / "pytorch_model.bin", pickle_protocol=protocol)
    recipe = write_recipe(tmp_path, experts=["a"])
    refuses(recipe, tmp_path / "out", "holds pytorch_model.bin, a pickle, which moerge does not load (it asks for ")
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.parametrize(
    "code",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0, with strings
        b"\x80\x02}q\x00(X\x01\x00\x00\x00acos\nsystem\nX\x04\x00\x00\x00true\x85Ru.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",  # OBJ
        b"(ios\nsystem\n.",  # INST
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02X\x01\x00\x00\x00a\x85Q.",  # a storage of nothing
        b"\x80\x02.",
        b"\x80\x02}",
        b"",
        b"\x80\x02(" * 1000 + b"t.",
        b"\x80\x02h\x05.",
        b"\x80\x02}(NNu.",
        b"\x80\x02]q\x00h\x00a.",
    ],
)
def test_pickles_by_hand(code: bytes) -> None:
    with pytest.raises(UnreadablePickle):
        assert layouts_of(code) == {"something": "else"}


@given(data=st.data())
def test_garbled_pickles_are_refused_or_read(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Any change of a byte gives tensors or a refusal, and no other exception."""
    content = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, content)
    garbled = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        garbled[data.draw(st.integers(0, len(garbled) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.getbasetemp() / "garbled.bin"
    file.write_bytes(bytes(garbled[: data.draw(st.integers(1, len(garbled)))]))
    try:
        for tensor in read_pickled(file).values():
            tensor.open().read(0, np.empty(min(tensor.size, 100), tensor.dtype.storage))
    except UnreadablePickle:
        pass


def test_storages_that_are_too_short(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(100)}, tmp_path / "a.bin")
    with zipfile.ZipFile(tmp_path / "a.bin") as old, zipfile.ZipFile(tmp_path / "b.bin", "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, content[:40] if entry.filename.endswith("data/0") else content)
    with pytest.raises(UnreadablePickle, match="'a'"):
        read_pickled(tmp_path / "b.bin")


def test_older_formats_are_refused(tmp_path: Path) -> None:
    folder = make_models(tmp_path, experts=["a"])["a"]
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    refuses(write_recipe(tmp_path, experts=["a"]), tmp_path / "out", "older than torch 1.6", "convert the checkpoint with")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    refuses(write_recipe(tmp_path, experts=["a"]), tmp_path / "out", "convert the checkpoint with")


def test_of_several_layouts_the_first_counts_as_in_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs moerge[models]")
    from transformers import AutoModelForCausalLM

    folder = make_models(tmp_path, experts=["a"], shards=2)["a"]
    state = {name: torch.from_numpy(value) for name, value in llama_tensors(llama_config(), seed=5).items()}
    torch.save(state, folder / "pytorch_model.bin")
    assert not open_folder(folder).notes and "safetensors" in open_folder(folder).files[0].name
    write_safetensors(folder / "model.safetensors", llama_tensors(llama_config(), seed=9))
    model = open_folder(folder, name="a")
    assert {file.name for file in model.files} == {"model.safetensors"}
    assert len(model.notes) == 1 and "model.safetensors.index.json" in model.notes[0]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    wanted = llama_tensors(llama_config(), seed=9)
    np.testing.assert_allclose(loaded["model.norm.weight"].numpy(), wanted["model.norm.weight"], rtol=2**-8)


def test_a_stale_index_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs moerge[models]")
    from transformers import AutoModelForCausalLM

    folder = make_models(tmp_path, experts=["a"], shards=2)["a"]
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    before, index = open_folder(folder), folder / "model.safetensors.index.json"
    names = list(before.tensors)
    stale = dict.fromkeys(names[:-1], "model-00002-of-00002.safetensors") | {names[0]: "model-00001-of-00002.safetensors"}
    write_json(index, {"metadata": {}, "weight_map": stale})
    model = open_folder(folder, name="a")
    assert model.tensors.keys() == before.tensors.keys() and "is stale" in model.notes[0] and str(index) in model.notes[0]
    again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[name], value) for name, value in loaded.items())


def test_links_as_in_the_hubs_cache(tmp_path: Path) -> None:
    folder = make_models(tmp_path, experts=["a"], shards=2)["a"]
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "commit"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    recipe = write_recipe(tmp_path, base=None, experts={"a": str(snapshot)}, merge={"method": "average"})
    assert moerge("merge", recipe, tmp_path / "out", "--quiet").code == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
