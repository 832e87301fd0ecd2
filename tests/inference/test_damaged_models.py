"""Models with damaged files: whatever runs them says so in one sentence, before it loads weights where that can be known."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moerge as package
from moerge.errors import InputError
from moerge.runtime import loading
from tests.helpers.command import moerge
from tests.helpers.tiny import edit_config, make_models, write_json

pytestmark = pytest.mark.slow

CUT = 3000


def cut(name: str, size: int = CUT) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size]) and None


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        write_json(folder / name, {**json.loads((folder / name).read_text()), **changes})

    return edit


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **changes)


def header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"data_offsets":[0', b'"data_offsets":[9', 1))


LOOKED_AT = {
    "truncated": (cut("model.safetensors"), "model.safetensors is truncated"),
    "header": (header, "model.safetensors"),
    "layers": (config(num_hidden_layers=4294967296), "num_hidden_layers is 4,294,967,296"),
    "heads": (config(num_attention_heads=4294967296), "num_attention_heads is 4,294,967,296"),
    "nested": (config(text_config={"n_layer": 10**9}), "text_config.n_layer is 1,000,000,000"),
    "config": (cut("config.json", 40), "config.json"),
}
DAMAGED = {
    **LOOKED_AT,
    "type": (config(hidden_size="sixteen"), "hidden_size"),
    "window": (config(sliding_window="x", use_sliding_window=True, model_type="mistral"), "sliding_window"),
    "activation": (config(hidden_act=["silu"]), "transformers cannot load"),
    "rope": (config(rope_scaling={"rope_type": "yarn", "factor": "x"}), "transformers cannot load"),
    "tokenizer": (edited("tokenizer.json", model={"type": "BPE", "vocab": 5}), "transformers cannot load the tokenizer of"),
    "tokenizer config": (edited("tokenizer_config.json", tokenizer_class=5), "transformers cannot load the tokenizer of"),
    "generation config": (edited("generation_config.json", max_new_tokens=[3], top_k={}), ""),
    "end": (edited("generation_config.json", eos_token_id="x"), ""),
}


def check(folder: Path, said: str, *commands: tuple[object, ...]) -> None:
    for command in commands:
        result = moerge(*command)
        if said or result.code:
            assert result.code == 2 and said in result.err and str(folder) in result.err, result
            assert len(result.err.splitlines()) == 1 and len(result.err) < 900, result.err


@pytest.mark.parametrize("kind", DAMAGED)
def test_running(tmp_path: Path, kind: str) -> None:
    damage, said = DAMAGED[kind]
    folder = make_models(tmp_path)["base"]
    damage(folder)
    (tmp_path / "text.txt").write_text("w3 w4 w5 w6 w7")
    evaluation = ("eval", folder, "--perplexity", f"a={tmp_path / 'text.txt'}")
    check(folder, said, ("generate", folder, "--prompt", "w3 w4", "--max-new-tokens", 3))
    check(folder, "" if kind == "activation" else said, evaluation)


@pytest.mark.parametrize("kind", LOOKED_AT)
def test_files_are_looked_at_before_weights_are_loaded(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    damage, said = LOOKED_AT[kind]
    folder = make_models(tmp_path)["base"]
    damage(folder)
    monkeypatch.setattr(loading, "explained", None)  # which is around all that transformers does
    with pytest.raises(InputError, match=said):
        loading.load_model(folder)


def test_tokens_without_an_embedding(tmp_path: Path) -> None:
    folder = make_models(tmp_path)["base"]
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"w9": 9', '"w9": 99'))
    result = moerge("generate", folder, "--prompt", "w9 w8")
    assert result.code == 2 and "token 99" in result.err and "64 rows" in result.err


def test_models_of_other_element_types_are_not_refused(tmp_path: Path) -> None:
    folder = make_models(tmp_path)["base"]
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b'"BF16"', b'"F9.9"'))
    with pytest.raises(InputError, match="transformers cannot load"):
        loading.load_model(folder)


def test_only_one_file_loads_checkpoints() -> None:
    root = Path(package.__file__).parent
    callers = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and "modeling" not in path.parts
    }
    assert callers == {
        "runtime/loading.py",
        "architecture/needed.py",
        "checkpoint/gguf_file.py",
    }  # the latter two without weights
