"""Merged models of other vocabularies than their sources' run as they should: dense, token-routed and sequence-routed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge as api
from tests.helpers.command import moerge
from tests.helpers.tiny import read_values, write_recipe
from tests.helpers.vocabularies import EMBEDDING, HEAD, row, value, write_model

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

TEXT = "w3 w5 <|im_start|> w4 <|im_end|> w5"


def write_family(folder: Path, **options: Any) -> None:
    """A base, and a chat expert in which all tokens stand elsewhere; the same weights but for rows of tokens."""
    write_model(folder / "base", ["w3", "w4", "w5"], dtype="F32", **options)
    write_model(folder / "chat", ["w5", "w4", "w3"], added=["<|im_start|>", "<|im_end|>"], dtype="F32", **options)


def logits_by_token(folder: Path, text: str) -> dict[str, np.ndarray]:
    """The logits after each token of a text, by the text of what comes next."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        logits_TV = model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0].numpy()
    return {token: logits_TV[:, number] for token, number in tokenizer.get_vocab().items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("setting", ["chat", "union"])
def test_a_merge_computes_what_the_expert_does(tmp_path: Path, setting: str, tied: bool) -> None:
    """Passed through in full (scale 1), the expert's logits come out, whatever the ids are called."""
    write_family(tmp_path, tied=tied, rows=16)
    merge = {"method": "task_arithmetic", "scale": 1.0}
    api.merge(write_recipe(tmp_path, experts=("chat",), tokenizer=setting, merge=merge), tmp_path / "out", threads=1)
    merged, expert = (logits_by_token(tmp_path / name, TEXT) for name in ("out", "chat"))
    assert merged.keys() == expert.keys() and len(merged) == 8
    for token in expert:
        assert np.allclose(merged[token], expert[token], atol=1e-5), token
    if setting == "union":
        base = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
        out = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
        assert out("w3 w4 w5")["input_ids"] == base("w3 w4 w5")["input_ids"]
        assert out.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [6, 7]


def test_a_token_routed_moe(tmp_path: Path) -> None:
    write_family(tmp_path)
    recipe = write_recipe(tmp_path, experts=("chat",), tokenizer="union", moe={"router": {"kind": "random"}})
    out = tmp_path / "out"
    assert moerge("merge", recipe, out).code == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("mixtral", 8)
    assert np.array_equal(row(out, HEAD, "<|im_end|>"), value("chat", HEAD, "<|im_end|>", "F32"))
    wanted = (value("base", EMBEDDING, "w3", "F32") + value("chat", EMBEDDING, "w3", "F32")) / 2
    assert np.array_equal(row(out, EMBEDDING, "w3"), wanted)
    assert moerge("verify", out).code == 0
    assert set(logits_by_token(out, TEXT)) >= {"<|im_end|>", "w5"}


def test_routers_read_text_as_the_result_does(tmp_path: Path) -> None:
    write_family(tmp_path)
    for name in ("base", "chat"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join([TEXT, "w4 w4 w3"]) if name == "chat" else "w3 w4 w5 w5\n\nw5 w3 w4")
    calibration = {"base": "base.txt", "chat": "chat.txt"}
    moe = {"router": {"kind": "hidden"}}
    recipe = write_recipe(tmp_path, experts=("chat",), tokenizer="union", moe=moe, calibration=calibration)
    result = moerge("merge", recipe, tmp_path / "out")
    assert result.code == 0, result.err
    assert moerge("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("separate", [["ffn"], ["ffn", "embedding", "head"]])
def test_a_sequence_routed_moe(tmp_path: Path, separate: list[str]) -> None:
    """Kept separate, an expert's embedding gets the rows it lacks from those that have them; routed to, it is the expert."""
    write_family(tmp_path)
    moe = {"format": "moerge", "separate": separate, "router": {"kind": "fixed", "expert": "chat"}}
    out = tmp_path / "out"
    result = moerge("merge", write_recipe(tmp_path, experts=("chat",), tokenizer="union", moe=moe), out)
    assert result.code == 0, result.err
    assert moerge("verify", out).code == 0
    values = read_values(out)
    heads = [array for name, array in values.items() if "lm_head" in name]
    if separate == ["ffn"]:
        assert np.array_equal(heads[0][7], value("chat", HEAD, "<|im_end|>", "F32"))
        return
    assert [head.shape for head in heads] == [(8, 16)] * 2
    assert np.array_equal(heads[0][7], value("chat", HEAD, "<|im_end|>", "F32"))  # the base has none of its own
    assert np.array_equal(heads[0][3], value("base", HEAD, "w3", "F32"))
    assert np.array_equal(heads[1][3], value("chat", HEAD, "w3", "F32"))
    merged, expert = (logits_by_token(folder, TEXT) for folder in (out, tmp_path / "chat"))
    for token in expert:
        assert np.allclose(merged[token], expert[token], atol=1e-5), token
