"""`moerge route`: shares per text of sequence-routed and token-routed models, checked against what the models compute."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from moerge import figures
from moerge.inference.figure import write_routes
from moerge.inference.result import TextRoute, routes_of
from tests.helpers.command import moerge as command
from tests.helpers.tiny import EXPERTS, write_recipe

torch = pytest.importorskip("torch", reason="needs moerge[models]")
transformers = pytest.importorskip("transformers", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

NAMES = ["base", *EXPERTS]
DOCUMENTS = {"math": ["w3 w4 w5 w6", "w7 w8 w9", "w10 w11 w12 w13 w14"], "poems": ["w40 w41 w42", "w50 w51"]}


@pytest.fixture(scope="module")
def folder(checkpoints: Path) -> Path:
    """The checkpoints, and a text file for each name of DOCUMENTS."""
    for name, documents in DOCUMENTS.items():
        write_text(checkpoints / f"{name}.jsonl", documents)
    return checkpoints


def write_text(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


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


def mean_losses(model: Any, documents: list[str]) -> list[float]:
    with torch.no_grad():
        return [model(ids(document), labels=ids(document)).loss.item() for document in documents]


def assert_oracle(found: Any, loss_DE: dict[str, list[list[float]]], first_DE: dict[str, list[list[float]]]) -> None:
    accuracies = []
    for name, rows in loss_DE.items():
        text = found["texts"][name]
        best = [row.index(min(row)) for row in rows]
        assert list(text["loss"].values()) == pytest.approx(average(rows), abs=1e-5)
        assert list(text["best"].values()) == pytest.approx([best.count(index) / len(best) for index in range(len(NAMES))])
        accuracies.append(sum(row[index] for row, index in zip(first_DE[name], best, strict=True)) / len(rows))
        assert text["oracle_accuracy"] == pytest.approx(accuracies[-1])
    assert found["oracle_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))


@pytest.mark.parametrize("kind", ["perplexity", "random"])
def test_the_oracle_of_a_sequence_routed_model_is_the_best_fixed_routing(kind: str, folder: Path, tmp_path: Path) -> None:
    from moerge.inference.routes import route
    from moerge.runtime.loading import load

    loaded = load(folder / "routed")
    first_DE, loss_DE = {}, {}
    for name, documents in DOCUMENTS.items():
        rows = []
        for expert in NAMES:
            loaded.model.set_routing("fixed", expert=expert)
            rows.append(mean_losses(loaded.model, documents))
        loss_DE[name] = [list(row) for row in zip(*rows, strict=True)]
        loaded.model.set_routing(kind)
        alphas = [loaded.model.route(ids(document)).alpha[0].tolist() for document in documents]
        first_DE[name] = [[float(alpha == max(row)) for alpha in row] for row in alphas]
    found = route(loaded, {name: str(folder / f"{name}.jsonl") for name in DOCUMENTS})
    assert_oracle(found.to_json(), loss_DE, first_DE)
    assert (found.oracle_accuracy == 1.0) == (kind == "perplexity")  # which goes by the same losses


def test_the_oracle_of_a_token_routed_model_is_the_expert_that_gets_all_tokens(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "native").eval()
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    originals = [layer.mlp.forward for layer in model.model.layers]
    first_DE: dict[str, list[list[float]]] = {}
    for name, documents in DOCUMENTS.items():
        first_DE[name] = []
        for document in documents:
            states: list[Any] = []
            handles = [
                layer.mlp.register_forward_pre_hook(lambda _, given, kept=states: kept.append(given[0][0]))
                for layer in model.model.layers
            ]
            mean_losses(model, [document])
            for handle in handles:
                handle.remove()
            chosen = torch.cat([(state @ gate.T).argmax(-1) for state, gate in zip(states, gates, strict=True)])
            first_DE[name].append([float((chosen == index).float().mean()) for index in range(4)])
    loss_DE: dict[str, list[list[float]]] = {name: [] for name in DOCUMENTS}
    for expert in range(4):
        for layer in model.model.layers:
            experts = layer.mlp.experts
            layer.mlp.forward = lambda x, experts=experts, expert=expert: experts(
                x[0], torch.full((x.shape[1], 1), expert), torch.ones(x.shape[1], 1)
            )[None]
        for name, documents in DOCUMENTS.items():
            loss_DE[name].append(mean_losses(model, documents))
    for layer, original in zip(model.model.layers, originals, strict=True):
        layer.mlp.forward = original
    loss_DE = {name: [list(row) for row in zip(*rows, strict=True)] for name, rows in loss_DE.items()}
    found = routes(folder, "native")
    assert_oracle(found, loss_DE, first_DE)
    assert 0 < found["oracle_accuracy"] < 1
    for text in found["texts"].values():
        layers = [list(layer.values()) for layer in text["layers"]]
        assert len(layers) == 2 and layers[0] != layers[1]
        assert average(layers) == pytest.approx(list(text["alpha"].values()))


@pytest.mark.parametrize("name", ["routed", "native"])
def test_documents_of_one_token_have_no_oracle(name: str, folder: Path, tmp_path: Path) -> None:
    long = ["w3 w4 w5 w6", "w7 w8 w9"]
    write_text(tmp_path / "both.jsonl", [*long, "w5"])
    write_text(tmp_path / "long.jsonl", long)
    write_text(tmp_path / "short.jsonl", ["w5", "w6"])
    texts = [f"--text={text}={tmp_path / text}.jsonl" for text in ("both", "long", "short")]
    found = command("route", folder / name, *texts, "--json").json["texts"]
    assert (found["both"]["documents"], found["short"]["documents"]) == (3, 2)
    for key in ("best", "loss", "oracle_accuracy"):
        assert found["both"][key] == found["long"][key] is not None
        assert found["short"][key] is None
    without = command("route", folder / name, *texts, "--json", "--no-oracle").json
    assert without["oracle_accuracy"] is None and without["texts"]["long"]["best"] is None


def test_calibration_text_is_refused(folder: Path, tmp_path: Path) -> None:
    names = ["base", *EXPERTS]
    own = {name: [f"w{7 * index + 3} w{7 * index + n + 4} w9" for n in range(4)] for index, name in enumerate(names)}
    calibration = {name: str(write_text(tmp_path / f"{name}.jsonl", documents)) for name, documents in own.items()}
    recipe = write_recipe(folder, "ridge.yaml", moe={"router": {"kind": "ridge"}}, calibration=calibration)
    assert command("merge", recipe, tmp_path / "moe").code == 0
    seen = write_text(tmp_path / "seen.jsonl", ["w50 w51", own["code"][2].upper().replace("W", "w") + "\n", "w52 w53"])
    other = write_text(tmp_path / "other.jsonl", ["w50 w51", "w52 w53"])
    texts = ("--text", f"math={other}", "--text", f"code={seen}")
    refused = command("route", tmp_path / "moe", *texts)
    overlap = (
        f"text 'code' ({seen}): {tmp_path / 'moe'} was calibrated on 1 of its 3 documents, so figures on them are no evidence"
    )
    assert (refused.code, refused.out) == (2, "")
    assert refused.err == f"moerge: {overlap}: name other text, or go on with --allow-calibration-text\n"
    allowed = command("route", tmp_path / "moe", *texts, "--allow-calibration-text")
    assert (allowed.code, allowed.err) == (0, f"warning: {overlap}\n")
    assert command("route", tmp_path / "moe", *texts, "--allow-calibration-text", "--json").json["warnings"] == [overlap]
    assert command("route", tmp_path / "moe", "--text", f"math={other}", "--json").json["warnings"] == []
    assert command("route", tmp_path / "moe", *texts, "--limit", 1).code == 0  # the document is not among the first


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
    best = [row["best"] for row in rows]
    assert [float(cell) for cell in best[:4]] == pytest.approx(list(found["texts"]["math"]["best"].values()), abs=1e-6)
    options = ("--text", f"math={folder / 'math.jsonl'}")
    table = command("route", folder / "routed", *options).out.splitlines()
    assert table[0].split() == ["text", "docs", *NAMES, "entropy", "accuracy", "oracle"]
    assert table[1].split()[:2] == ["math", "3"] and table[1].split()[-1] == "100%"
    legend = " ".join(" ".join(table).split())
    assert "oracle: it is the one with the lowest loss on the document; load balance" in legend
    assert "(1: even, 4: all to one)" in legend
    table = command("route", folder / "routed", *options, "--no-oracle", "--out", tmp_path).out.splitlines()
    assert table[0].split() == ["text", "docs", *NAMES, "entropy", "accuracy"]
    assert "oracle" not in " ".join(table)
    assert (tmp_path / "route.csv").read_text().splitlines()[1].endswith(",,")


TWO = ("first expert", "second expert")


def text_route(documents: int, alpha_E: tuple[float, ...], first_E: tuple[float, ...], **more: Any) -> TextRoute:
    """The routing of a text by the experts of `TWO`."""
    alpha, first = (dict(zip(TWO, values, strict=True)) for values in (alpha_E, first_E))
    return TextRoute(**{"documents": documents, "alpha": alpha, "first": first, "entropy": 0.5, "accuracy": None, **more})


def test_the_figure_has_a_bar_for_each_text_and_expert(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs moerge[figures]")
    oracle = {"oracle_accuracy": 0.5, "best": dict.fromkeys(TWO, 0.5), "loss": dict(zip(TWO, (1.0, 2.0), strict=True))}
    texts = {name: text_route(7, (0.25, 0.75), (0.0, 1.0), **oracle) for name in ("poems", "prose")}
    routes = routes_of("model", "token", TWO, texts)
    write_routes(routes, tmp_path)
    before = (tmp_path / "route.svg").read_bytes()
    assert (tmp_path / "route.png").read_bytes().startswith(b"\x89PNG")
    for word in (
        b"thin bars",
        b"mean weight over tokens and layers, %; n documents",
        b"poems: first expert 25%, second expert 75%.",
    ):
        assert before.count(word) == 1
    for word, times in ((b">poems<", 1), (b">prose<", 1), (b">n = 7<", 2), (b">first expert<", 1), (b">second expert<", 1)):
        assert before.count(word) == times, word
    for colour in (figures.color(0), figures.color(1)):
        assert colour.lower().encode() in before
    write_routes(routes, tmp_path)
    assert (tmp_path / "route.svg").read_bytes() == before
    plain = {name: text_route(7, (0.25, 0.75), (0.0, 1.0)) for name in texts}
    write_routes(routes_of("model", "token", TWO, plain), tmp_path)
    without = (tmp_path / "route.svg").read_bytes()
    assert b"thin bars" not in without
    assert before.count(b"clip-path=") - without.count(b"clip-path=") == 4  # a thin bar for each text and expert


def test_layers_have_a_figure_and_a_table_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs moerge[figures]")
    alpha_LE = ((0.25, 0.75), (0.5, 0.5), (1.0, 0.0))
    layers = tuple(dict(zip(TWO, alpha_E, strict=True)) for alpha_E in alpha_LE)
    texts = {name: text_route(7, (0.5, 0.5), (0.0, 1.0), layers=layers) for name in ("a", "b", "c", "d")}
    write_routes(routes_of("model", "token", TWO, texts), tmp_path)
    rows = list(csv.DictReader((tmp_path / "route-layers.csv").read_text().splitlines()))
    assert len(rows) == 4 * 3 * 2
    assert rows[3] == {"text": "a", "documents": "7", "layer": "1", "expert": "second expert", "alpha": "0.500000"}
    drawn = (tmp_path / "route-layers.svg").read_bytes()
    assert [drawn.count(f">{name} (n = 7)<".encode()) for name in "abcd"] == [1, 1, 1, 1]
    assert drawn.count(b">first expert<") == 1
    assert (tmp_path / "route-layers.png").exists()
    assert b"nan" not in drawn


def test_without_matplotlib_there_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "available", lambda: False)
    write_routes(routes_of("model", "token", TWO, {"x": text_route(1, (1.0, 0.0), (1.0, 0.0))}), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["route.csv", "route.json"]


def test_figures_of_known_routes() -> None:
    texts = {
        "a": text_route(10, (1.0, 0.0), (1.0, 0.0), accuracy=1.0),
        "b": text_route(10, (0.5, 0.5), (0.8, 0.2), accuracy=0.2),
        "c": text_route(10, (0.0, 1.0), (0.0, 1.0)),
    }
    even = routes_of("model", "sequence", TWO, texts)
    assert even.accuracy == pytest.approx(0.6)
    assert even.load == dict.fromkeys(TWO, 0.5)
    assert even.balance == pytest.approx(1.0)
    assert routes_of("model", "sequence", TWO, {"a": texts["a"]}).balance == 2.0


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


def test_the_manifest_of_a_checkpoint_on_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from moerge.runtime.loading import Loaded

    calls = []

    def download(*arguments: object, **options: object) -> str:
        calls.append((arguments, options))
        if arguments[0] == "someone/else":
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        return str(folder / "native" / "moerge.json")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    manifest = Loaded("owner/name@v2", None, None).manifest
    assert manifest is not None and manifest["experts"] == NAMES
    assert Loaded("someone/else", None, None).manifest is None
    assert calls == [
        (("owner/name", "moerge.json"), {"revision": "v2"}),
        (("someone/else", "moerge.json"), {"revision": None}),
    ]
