"""`moerge export --gguf`: llama.cpp's limits first, then the user's converter, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.command import moerge
from tests.helpers.tiny import edit_config, make_models, write_json

CONVERTER = """
import argparse, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype")
given = parser.parse_args()
assert (given.model / "config.json").is_file()
given.outfile.write_bytes({magic!r} + given.outtype.encode())
{end}
"""


def converter(folder: Path, magic: bytes = b"GGUF", end: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER.format(magic=magic, end=end))
    return folder / "convert_hf_to_gguf.py"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_models(tmp_path, experts=["a"], base=False)["a"]
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = {"type": "BPE", "vocab": tokenizer["model"]["vocab"], "merges": [], "unk_token": "<unk>"}
    write_json(folder / "tokenizer.json", {**tokenizer, "model": model})
    return folder


def test_the_converter_writes_the_file(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, out = converter(tmp_path / "llama.cpp"), tmp_path / "a.gguf"
    result = moerge("export", model, out, "--gguf", "--converter", program, "--outtype", "f16", "--json")
    assert result.code == 0 and out.read_bytes() == b"GGUFf16", result.err
    assert result.json["file"] == str(out) and result.json["converter"] == str(program)
    again = moerge("export", model, out, "--gguf", "--converter", program)
    assert again.code == 2 and "already exists" in again.err
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "llama.cpp"))
    assert moerge("export", model, out, "--gguf", "--force").code == 0 and out.read_bytes() == b"GGUFauto"


@pytest.mark.parametrize(
    ("magic", "end", "part"),
    [(b"GGUF", "sys.exit('no such tensor')", "no such tensor"), (b"oops", "", "wrote no GGUF file"), (b"", "", "no GGUF file")],
)
def test_a_converter_that_fails_leaves_nothing(tmp_path: Path, model: Path, magic: bytes, end: str, part: str) -> None:
    program = converter(tmp_path / "llama.cpp", magic, end)
    before = sorted(tmp_path.iterdir())
    result = moerge("export", model, tmp_path / "a.gguf", "--gguf", "--converter", program)
    assert result.code == 2 and part in result.err and str(program) in result.err and len(result.err.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_what_llama_cpp_cannot_run_is_refused_first(tmp_path: Path, model: Path) -> None:
    edit_config(model, model_type="flex_olmo", architectures=["FlexOlmoForCausalLM"])
    result = moerge("export", model, tmp_path / "a.gguf", "--gguf", "--converter", "/nowhere", "--json")
    assert (result.code, result.json["error"]["code"]) == (2, "client-cannot-run")


def test_calls_that_cannot_work(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    for options, part in (
        ((), "--gguf"),
        (("--gguf",), "--converter"),
        (("--gguf", "--converter", tmp_path / "none.py"), "none.py"),
        (("--gguf", "--outtype", "q4_k"), "q8_0"),
    ):
        result = moerge("export", model, tmp_path / "a.gguf", *options)
        assert result.code == 2 and part in result.err, result.err
    assert moerge("export", tmp_path / "none", tmp_path / "a.gguf", "--gguf").code == 2
