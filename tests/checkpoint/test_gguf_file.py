"""GGUF files as models: what transformers loads from them, to the last bit, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.checkpoint.locate import locate
from moerge.tensors.dtypes import DTYPES
from moerge.tensors.tensor import ArrayTensor, Tensor
from moerge.tensors.views.ggml import BLOCK_BYTES, BlockTensor
from tests.helpers.command import moerge, refuses
from tests.helpers.gguf_files import gguf, write_gguf
from tests.helpers.hf_models import CASES, random_model, save
from tests.helpers.tiny import write_recipe

torch = pytest.importorskip("torch", reason="needs moerge[gguf]")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

WIDE = {"hidden_size": 64, "intermediate_size": 96}
quiet = pytest.mark.filterwarnings("ignore")


def model_folder(folder: Path, case: str = "llama", seed: int = 0, **sizes: Any) -> Path:
    return save(random_model(CASES[case](**{**WIDE, **sizes}), seed=seed), folder)


def values(tensor: Tensor) -> np.ndarray:
    stored = tensor.open().read(0, np.empty(tensor.size, tensor.dtype.storage))
    wide = (stored.astype(np.uint32) << 16).view(np.float32) if tensor.dtype.name == "BF16" else stored.astype(np.float32)
    return wide.reshape(tensor.shape)


def loaded(path: Path) -> dict[str, Any]:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).state_dict()


@quiet
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_type_is_what_transformers_loads(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", model_folder(tmp_path / "m"), kind)
    model, expected = locate(str(path)), loaded(path)
    assert model.tensors.keys() == expected.keys()
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(values(tensor), expected[name].numpy(), err_msg=name)


@quiet
@pytest.mark.parametrize(
    ("case", "sizes"), [("qwen2", {}), ("qwen3", {"head_dim": 128}), ("llama", {"tie_word_embeddings": True})]
)
def test_every_family_is_what_transformers_loads(tmp_path: Path, case: str, sizes: dict[str, Any]) -> None:
    source = model_folder(tmp_path / "m", case, **sizes)
    path = write_gguf(tmp_path / "a.gguf", source, "Q8_0")
    model, expected = locate(str(path)), loaded(path)
    is_tied = "tie_word_embeddings" in sizes
    assert model.tensors.keys() == expected.keys() - ({"lm_head.weight"} if is_tied else set())
    assert model.config["tie_word_embeddings"] is is_tied
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(values(tensor), expected[name].numpy(), err_msg=name)


@quiet
def test_experts_are_taken_apart(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "m", "qwen3_moe", head_dim=128, moe_intermediate_size=32)
    path = write_gguf(tmp_path / "a.gguf", source, "F32")
    model, stored = locate(str(path)), locate(str(source))
    assert model.tensors.keys() == stored.tensors.keys()
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(values(tensor), values(stored.tensors[name]), err_msg=name)


@quiet
def test_merging_with_an_ordinary_checkpoint(tmp_path: Path) -> None:
    base = model_folder(tmp_path / "base")
    write_gguf(tmp_path / "a.gguf", model_folder(tmp_path / "a", seed=1), "Q4_0")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf").save_pretrained(base)
    (tmp_path / "base" / "tokenizer.model").unlink(missing_ok=True)
    recipe = write_recipe(tmp_path, experts={"a": "a.gguf"}, merge={"method": "task_arithmetic", "scale": 0.5}, dtype="float32")
    result = moerge("merge", recipe, tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert any("a.gguf are read as float32" in note for note in result.json["notes"])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    one = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, other in loaded(tmp_path / "a.gguf").items():
        expected = one[name].double() + 0.5 * (other.double() - one[name].double())
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-6, atol=1e-7)


@quiet
def test_the_result_has_the_files_tokenizer_and_config(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", model_folder(tmp_path / "m"), "F16")
    recipe = write_recipe(tmp_path, base=None, experts={"a": "a.gguf"}, merge={"method": "average"})
    assert moerge("merge", recipe, tmp_path / "out", "--quiet").code == 0
    text = "abc ab a cab"
    ours, theirs = AutoTokenizer.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"] and ours.eos_token == "</s>"
    inputs = torch.tensor([[5, 6, 7, 3]])
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    torch.testing.assert_close(one(inputs).logits, other(inputs).logits, rtol=1e-5, atol=1e-5)


@given(data=st.data(), kind=st.sampled_from(sorted(BLOCK_BYTES)))
def test_any_window_of_blocks_is_what_the_gguf_package_makes_of_them(data: st.DataObject, kind: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (40, BLOCK_BYTES[kind])).astype(np.uint8)
    stored[:, 1] &= 0x3F  # scales that are finite
    stored[:, 3] &= 0x3F
    whole = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[kind]).reshape(-1)
    tensor = BlockTensor("a", (40, 32), kind, ArrayTensor("a", DTYPES["U8"], (stored.size,), stored.reshape(-1)))
    start = data.draw(st.integers(0, 40 * 32 - 1))
    count = data.draw(st.integers(1, 40 * 32 - start))
    np.testing.assert_array_equal(tensor.open().read(start, np.empty(count, np.float32)), whole[start : start + count])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-700])


def _of_version(number: int) -> Any:
    return lambda path: path.write_bytes(path.read_bytes()[:4] + struct.pack("<I", number) + path.read_bytes()[8:])


BAD: dict[str, tuple[Any, list[str]]] = {
    "truncated in its tensors": (_cut, ["a.gguf", "truncated", "fetch or copy it again"]),
    "truncated in its header": (lambda path: path.write_bytes(path.read_bytes()[:300]), ["a.gguf", "truncated or damaged"]),
    "of version 1": (_of_version(1), ["a.gguf", "version 1", "2 and 3"]),
    "of another byte order": (_of_version(3 << 24), ["a.gguf", "little-endian"]),
    "no GGUF file": (lambda path: path.write_bytes(b"GGML" + path.read_bytes()[4:]), ["a.gguf is not a GGUF file"]),
    "empty": (lambda path: path.write_bytes(b""), ["a.gguf is not a GGUF file"]),
}


@quiet
@pytest.mark.parametrize("kind", BAD)
def test_damaged_files(tmp_path: Path, kind: str) -> None:
    damage, parts = BAD[kind]
    damage(write_gguf(tmp_path / "a.gguf", model_folder(tmp_path / "m"), "Q8_0"))
    recipe = write_recipe(tmp_path, base=None, experts={"a": "a.gguf"}, merge={"method": "average"})
    refuses(recipe, tmp_path / "out", "a: ", *parts)


UNREAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another type of blocks": ({"kind": "Q5_0"}, ["stored as Q5_0", "Q8_0, Q4_0, Q4_1"]),
    "another architecture": ({"architecture": "starcoder2"}, ["'starcoder2'", "llama, qwen2, qwen3"]),
    "one part of several": ({"split.count": 3}, ["a.gguf is one part of several", "llama-gguf-split"]),
    "a header that lies about layers": ({"block_count": 3}, ["it has no tensor 'blk.2"]),
    "a header that lies about the width": ({"embedding_length": 32}, ["has shape [", "expected ["]),
}


@quiet
@pytest.mark.parametrize("kind", UNREAD)
def test_files_that_are_not_read(tmp_path: Path, kind: str) -> None:
    options, parts = UNREAD[kind]
    write_gguf(tmp_path / "a.gguf", model_folder(tmp_path / "m"), **options)
    recipe = write_recipe(tmp_path, base=None, experts={"a": "a.gguf"}, merge={"method": "average"})
    refuses(recipe, tmp_path / "out", "a: ", *parts)
