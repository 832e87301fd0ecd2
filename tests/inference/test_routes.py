"""`moerge route`: shares per text of sequence-routed and token-routed models, checked against what the models compute."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

import moerge
from command import moerge as command
from moerge.inference.routes import Routes, TextRoute
from tiny import EXPERTS, make_models, write_recipe

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

NAMES = ["base", *EXPERTS]
DOCUMENTS = {"math": ["w3 w4 w5 w6", "w7 w8 w9", "w10 w11 w12 w13 w14"], "poems": ["w40 w41 w42", "w50 w51"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints `routed` and `native`, and a text file for each name of DOCUMENTS."""
    folder = tmp_path_factory.mktemp("models")
    make_models(folder, dtype="F32", config={"torch_dtype": "float32"})
    for name, moe in {
        "native": {"router": {"std": 2.0}},
        "routed": {"format": "moerge", "separate": ["ffn", "attention"]},
    }.items():
        moerge.merge(write_recipe(folder, f"{name}.yaml", moe=moe), folder / name, threads=1)
    for name, documents in DOCUMENTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def routes(folder: Path, name: str, *options: object) -> Any:
    texts = [part for text in DOCUMENTS for part in ("--text", f"{text}={folder / text}.jsonl")]
    result = command("route", folder / name, *texts, *options, "--json")
    assert (result.code, result.err) == (0, "")
    return result.json


def ids(text: str) -> Any:
    return torch.tensor([[int(word[1:]) for word in text.split()]])


def average(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def entropy(alpha_E: list[float]) -> float:
    return -sum(alpha * math.log(alpha) for alpha in alpha_E if alpha)


def test_sequence_routed(folder: Path) -> None:
    from moerge.modeling import register

    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "routed").eval()
    found = routes(folder, "routed")
    assert (found["level"], found["experts"]) == ("sequence", NAMES)
    alpha, first = {}, {}
    for name, documents in DOCUMENTS.items():
        rows = [model.route(ids(document)).alpha[0].tolist() for document in documents]
        alpha[name] = average(rows)
        first[name] = average([[float(value == max(row)) for value in row] for row in rows])
        text = found["texts"][name]
        assert text["documents"] == len(documents)
        assert list(text["alpha"].values()) == pytest.approx(alpha[name])
        assert list(text["first"].values()) == pytest.approx(first[name])
        assert text["entropy"] == pytest.approx(sum(map(entropy, rows)) / len(rows))
    assert found["texts"]["math"]["accuracy"] == first["math"][1]
    assert found["texts"]["poems"]["accuracy"] is None
    assert found["accuracy"] == first["math"][1]
    assert list(found["load"].values()) == pytest.approx(average(list(alpha.values())))
    pairs = zip(average(list(alpha.values())), average(list(first.values())), strict=True)
    assert found["balance"] == pytest.approx(4 * sum(a * f for a, f in pairs))


def test_token_routed(folder: Path) -> None:
    """Against router probabilities computed from the states that enter the gates."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "native").eval()
    probabilities: list[Any] = []
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    for gate in gates:
        gate.register_forward_pre_hook(
            lambda module, given: probabilities.append((given[0].reshape(-1, 16) @ module.weight.T).softmax(-1))
        )
    found = routes(folder, "native")
    assert (found["level"], found["experts"]) == ("token", NAMES)
    for name, documents in DOCUMENTS.items():
        alpha, first, spread = [], [], []
        for document in documents:
            probabilities.clear()
            with torch.no_grad():
                model(ids(document))
            assert len(probabilities) == len(gates) == 2
            every_NE = torch.cat(probabilities)
            alpha.append(every_NE.mean(0).tolist())
            first.append([float(share) for share in (every_NE.argmax(-1)[:, None] == torch.arange(4)).float().mean(0)])
            spread.append(sum(map(entropy, every_NE.tolist())) / len(every_NE))
        text = found["texts"][name]
        assert list(text["alpha"].values()) == pytest.approx(average(alpha), abs=1e-6)
        assert list(text["first"].values()) == pytest.approx(average(first), abs=1e-6)
        assert text["entropy"] == pytest.approx(average([[x] for x in spread])[0], abs=1e-5)
    assert found["accuracy"] == found["texts"]["math"]["first"]["math"]


def test_limit_and_tokens(folder: Path) -> None:
    found = routes(folder, "routed", "--limit", 1)
    assert [text["documents"] for text in found["texts"].values()] == [1, 1]
    cut = routes(folder, "routed", "--limit", 1, "--tokens", 2)
    assert cut["texts"]["math"]["alpha"] != found["texts"]["math"]["alpha"]


def test_names_of_experts_that_nobody_wrote_down(folder: Path) -> None:
    manifest = (folder / "native" / "moerge.json").read_bytes()
    (folder / "native" / "moerge.json").unlink()
    try:
        found = routes(folder, "native")
    finally:
        (folder / "native" / "moerge.json").write_bytes(manifest)
    assert (found["experts"], found["accuracy"]) == (["0", "1", "2", "3"], None)


def test_files_and_table(folder: Path, tmp_path: Path) -> None:
    found = routes(folder, "routed", "--out", tmp_path / "new" / "out")
    assert json.loads((tmp_path / "new" / "out" / "route.json").read_text()) == found
    rows = list(csv.DictReader((tmp_path / "new" / "out" / "route.csv").read_text().splitlines()))
    assert [(row["text"], row["expert"]) for row in rows] == [(text, name) for text in DOCUMENTS for name in NAMES]
    assert [float(row["alpha"]) for row in rows[:4]] == pytest.approx(list(found["texts"]["math"]["alpha"].values()), abs=1e-6)
    table = command("route", folder / "routed", "--text", f"math={folder / 'math.jsonl'}").out.splitlines()
    assert table[0].split() == ["text", "documents", *NAMES, "entropy", "accuracy"]
    assert table[1].split()[:2] == ["math", "3"]
    assert "(1: even, 4: all to one)" in " ".join(table)


def test_the_figure_has_a_bar_for_each_text_and_expert(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs moerge[figures]")
    texts = tuple(TextRoute(name, 1, (0.25, 0.75), (0.0, 1.0), 0.5, None) for name in ("poems", "prose"))
    routes = Routes("model", "token", ("first expert", "second expert"), texts)
    routes.write(tmp_path)
    before = (tmp_path / "route.svg").read_bytes()
    for word in (b">poems<", b">prose<", b">first expert<", b">second expert<"):
        assert before.count(word) == 1
    routes.write(tmp_path)
    assert (tmp_path / "route.svg").read_bytes() == before


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moerge.inference.routes.find_spec", lambda name: None)
    Routes("model", "token", ("a",), (TextRoute("x", 1, (1.0,), (1.0,), 0.0, None),)).write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["route.csv", "route.json"]


def test_figures_of_known_routes() -> None:
    texts = (
        TextRoute("a", 10, (1.0, 0.0), (1.0, 0.0), 0.0, 1.0),
        TextRoute("b", 10, (0.5, 0.5), (0.8, 0.2), math.log(2), 0.2),
        TextRoute("c", 10, (0.0, 1.0), (0.0, 1.0), 0.0, None),
    )
    even = Routes("model", "sequence", ("a", "b"), texts)
    assert even.accuracy == pytest.approx(0.6)
    assert even.load_E == (0.5, 0.5)
    assert even.balance == pytest.approx(1.0)
    assert Routes("model", "sequence", ("a", "b"), texts[:1]).balance == 2.0


def test_bad_calls(folder: Path, tmp_path: Path) -> None:
    def error(*arguments: object, checkpoint: str = "routed") -> str:
        result = command("route", folder / checkpoint, *arguments)
        assert (result.code, result.out) == (2, "")
        return result.err

    text = f"math={folder / 'math.jsonl'}"
    assert "Missing option '--text'" in error()
    assert error("--text", "math") == "moerge: --text 'math' should be NAME=FILE, such as math=math.jsonl\n"
    assert "--text 'math' is given twice" in error("--text", text, "--text", text)
    assert "text 'math': there is no file or folder" in error("--text", f"math={tmp_path / 'none.txt'}")
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no text" in error("--text", f"math={tmp_path / 'empty.txt'}")
    assert "is a llama model without experts: only a MoE routes" in error("--text", text, checkpoint="math")
    (tmp_path / "file").write_text("")
    assert f"moerge: cannot write to {tmp_path / 'file'}" in error("--text", text, "--out", tmp_path / "file")
