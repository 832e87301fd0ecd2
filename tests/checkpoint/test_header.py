"""The safetensors header: written as the library writes it, and every lie in it found before a byte of data is used."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge import MachineError
from moerge.checkpoint.header import build_header, read_header
from moerge.errors import SourceChangedError
from moerge.tensors.dtypes import DTYPES
from tests.helpers.command import moerge, refuses
from tests.helpers.tiny import make_models, write_recipe


def entry(dtype: Any, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
FOUR, TWELVE = b"\0" * 4, b"\0" * 12
DAMAGED = "tensor 'a' in {} has a damaged header entry: fetch or copy the file again"
BAD: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{", b"", "the header of {} is damaged (Expecting property name"),
    "not an object": (b"[]", b"", "the header of {} is damaged (it is not a JSON object)"),
    "not UTF-8": (b'{"\xff": 1}', b"", "the header of {} is damaged ('utf-8' codec can't decode"),
    "a name twice": (TWICE, FOUR, "the header of {} is damaged (a name appears twice)"),
    "nested": (b'{"a": ' + b"[" * 200_000, b"", "the header of {} is damaged (maximum recursion depth exceeded"),
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, TWELVE, "tensor 'b' in {} overlaps another one"),
    "same bytes": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, FOUR, "tensor 'b' in {} overlaps another one"),
    "hole": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, TWELVE, "a hole before tensor 'b' in {}"),
    "late start": ({"a": entry("F32", [1], 8, 12)}, TWELVE, "a hole before tensor 'a' in {}"),
    "trailing bytes": ({"a": entry("F32", [1], 0, 4)}, TWELVE, "{} has 8 bytes that no tensor claims"),
    "too short": ({"a": entry("F32", [3], 0, 12)}, FOUR, "{} is truncated: its header promises"),
    "size lie": (
        {"a": entry("F32", [9], 0, 4)},
        FOUR,
        "tensor 'a' in {} lies about its size: shape [9] of F32 needs 36 bytes, the header gives it 4",
    ),
    "large shape": ({"a": entry("F32", [2**60, 2**60], 0, 4)}, FOUR, "tensor 'a' in {} lies about its size"),
    "immense shape": ({"a": entry("F32", [10**4000, 10**4000], 0, 4)}, FOUR, DAMAGED),
    "too many dimensions": ({"a": entry("F32", [2**62] * 1000, 0, 4)}, FOUR, DAMAGED),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, FOUR, "tensor 'a' in {} lies about its size"),
    "negative extent": ({"a": entry("F32", [-1], 0, 4)}, FOUR, DAMAGED),
    "negative offset": ({"a": entry("F32", [1], -4, 0)}, FOUR, DAMAGED),
    "bool extent": ({"a": entry("F32", [True], 0, 4)}, FOUR, DAMAGED),
    "float extent": ({"a": entry("F32", [1.0], 0, 4)}, FOUR, DAMAGED),
    "shape as text": ({"a": entry("F32", "1", 0, 4)}, FOUR, DAMAGED),
    "offsets as text": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": "04"}}, FOUR, DAMAGED),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, FOUR, DAMAGED),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, FOUR, DAMAGED),
    "no entry": ({"a": 5}, b"", DAMAGED),
    "unknown type": (
        {"a": entry("Q4_K", [1], 0, 4)},
        FOUR,
        "tensor 'a' in {} has the element type 'Q4_K', which moerge does not",
    ),
    "a list for a type": ({"a": entry(["F32"], [1], 0, 4)}, FOUR, "tensor 'a' in {} has the element type ['F32']"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, b"", "code: {folder} holds no tensors: fetch or copy it again"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_header_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    header, data, message = BAD[case]
    models = make_models(tmp_path)
    file = models["code"] / "model.safetensors"
    write_raw(file, header, data)
    refuses(write_recipe(tmp_path), tmp_path / "out", message.format(file, folder=models["code"]))


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    file = make_models(tmp_path)["code"] / "model.safetensors"
    recipe = write_recipe(tmp_path)
    write_raw(file, {}, length=2**62)
    refuses(recipe, tmp_path / "out", f"{file} is not a safetensors file: its header would be 4,611,686,018,427,387,904 bytes")
    write_raw(file, {}, length=99_999_999)
    refuses(recipe, tmp_path / "out", f"{file} is truncated inside its header (10 bytes)")


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (0, "is truncated (0 bytes, not even a header)"),
        (7, "is truncated (7 bytes, not even a header)"),
        (8, "is truncated inside its header (8 bytes)"),
        (500, "is truncated inside its header (500 bytes)"),
        (-1, "is truncated: its header promises"),
        (-1000, "is truncated: its header promises"),
    ],
)
def test_a_truncated_shard_is_refused(tmp_path: Path, kept: int, message: str) -> None:
    file = make_models(tmp_path, shards=2)["code"] / "model-00002-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:kept])
    refuses(write_recipe(tmp_path), tmp_path / "out", f"{file} {message}", "fetch or copy it again")


def test_float8_is_refused_by_name(tmp_path: Path) -> None:
    for folder in make_models(tmp_path).values():
        header = (folder / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", header[:8])[0]
        entries = json.loads(header[8 : 8 + length])
        tensor = entries["model.norm.weight"]
        tensor["dtype"], tensor["shape"] = "F8_E4M3", [32]
        write_raw(folder / "model.safetensors", entries, header[8 + length :])
    result = moerge("plan", write_recipe(tmp_path))
    assert result.code == 2
    assert "tensor 'model.norm.weight'" in result.err


def test_float8_of_the_right_shape_is_refused(tmp_path: Path) -> None:
    for folder in make_models(tmp_path).values():
        (folder / "config.json").write_text('{"model_type": "novel"}')
        write_raw(folder / "model.safetensors", {"a": entry("F8_E4M3", [4], 0, 4)}, FOUR)
    refuses(write_recipe(tmp_path), tmp_path / "out", "base: tensor 'a' is stored as F8_E4M3: convert the checkpoint to float32")


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 4), max_size=3)),
        min_size=1,
        max_size=6,
    )
)
def test_what_is_built_reads_back(tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]]) -> None:
    tensors = [(f't.{i} \u00e9"', DTYPES[dtype], tuple(shape)) for i, (dtype, shape) in enumerate(kinds)]
    header, offsets = build_header(tensors, {"format": "pt"})
    assert len(header) % 8 == 0
    size = sum(int(np.prod(shape, dtype=int)) * dtype.itemsize for _, dtype, shape in tensors)
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    path.write_bytes(header + b"\0" * size)
    found = read_header(path)
    assert {name: (t.dtype, t.shape, t.offset) for name, t in found.items()} == {
        name: (dtype, shape, offsets[name]) for name, dtype, shape in tensors
    }


def test_the_bytes_equal_those_of_the_safetensors_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy", reason="needs moerge[models]")
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "ids": np.arange(4), "h": np.ones(3, np.float16)}
    theirs = library.save(arrays, {"format": "pt"})
    ordered = [("ids", DTYPES["I64"], (4,)), ("w", DTYPES["F32"], (2, 3)), ("h", DTYPES["F16"], (3,))]
    ours = build_header(ordered, {"format": "pt"})[0] + b"".join(arrays[name].tobytes() for name, _, _ in ordered)
    assert ours == theirs


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_raw(path, {"a": entry("F32", [3], 0, 12)}, TWELVE)
    tensor = read_header(path)["a"]
    elements = tensor.open()
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceChangedError, match=r"x\.safetensors was cut short"):
        elements.read(0, np.empty(3, np.float32))
    with pytest.raises(SourceChangedError, match=r"x\.safetensors was overwritten or replaced"):
        tensor.open()
    path.unlink()
    with pytest.raises(MachineError, match=r"cannot read .*x\.safetensors: No such file or directory"):
        tensor.open()
