"""The commands that run a model, on one whose experts are whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moerge.modeling import register
from tests.helpers.command import moerge
from tests.helpers.hf_models import load, torch
from tests.helpers.tiny import read_tensors
from tests.helpers.whole_models import TEXT, atomic_write, ids_of, make_mixed

pytestmark = pytest.mark.slow

register()
NAMES = ("llama", "gpt_neox")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """folder/learned: two experts, fitted, with a drawn gate that reads four tokens; folder/text.txt."""
    folder = tmp_path_factory.mktemp("mixed")
    make_mixed(folder, *NAMES)
    (folder / "text.txt").write_text("\n\n".join([TEXT, TEXT[::-1]]), encoding="utf-8")
    moe = {"prefix_tokens": 4, "top_k": 1, "router": {"kind": "random"}}
    result = moerge("merge", atomic_write(folder, NAMES, moe=moe), folder / "learned")
    assert result.code == 0, result.err
    return folder


def test_generate_tells_who_wrote(folder: Path) -> None:
    found = moerge("generate", folder / "learned", "--prompt", TEXT, "--max-new-tokens", 5, "--json")
    assert found.code == 0, found.err
    routing = found.json["routing"]
    alpha = load(folder / "learned").route(ids_of(folder / "learned")).alpha[0].tolist()
    assert routing == pytest.approx(dict(zip(NAMES, alpha, strict=True))) and sorted(alpha) == [0, 1]
    assert found.json["tokens"] <= 5


@pytest.mark.parametrize("kind", ["learned", "perplexity"])
def test_route_compares_with_the_experts_alone(kind: str, folder: Path, tmp_path: Path) -> None:
    out = folder / "learned"
    if kind != "learned":
        out = tmp_path / "out"
        recipe = atomic_write(folder, NAMES, name="other.yaml", moe={"prefix_tokens": 4, "router": {"kind": kind}})
        assert moerge("merge", recipe, out).code == 0
    (tmp_path / "one.txt").write_text(TEXT, encoding="utf-8")
    found = moerge("route", out, "--text", f"llama={tmp_path / 'one.txt'}", "--json")
    assert found.code == 0, found.err
    text = found.json["texts"]["llama"]
    ids, model = ids_of(out), load(out)
    assert ids.shape[1] > 4  # losses are those of the whole text, not of what the router reads
    with torch.no_grad():
        for expert, name in enumerate(NAMES):
            model.set_routing("fixed", expert=name)
            loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
            assert text["loss"][name] == pytest.approx(float(loss), rel=1e-4), expert


def test_perplexity_is_measured(folder: Path) -> None:
    text = f"text={folder / 'text.txt'}"
    found = moerge("eval", folder / "learned", folder / "llama", "--perplexity", text, "--given", 8, "--json")
    assert found.code == 0, found.err
    assert json.dumps(found.json).count("bits_per_byte") >= 2


@pytest.mark.parametrize(
    ("train", "trained"),
    [
        ("router", ("router.",)),
        ("projectors", ("model.projectors_",)),
        ("experts", ("model.experts.",)),
        ("experts.gpt_neox", ("model.experts.1.",)),
        ("backbone", ("model.embed_tokens.", "lm_head.")),
    ],
)
def test_parts_of_it_are_tuned(train: str, trained: tuple[str, ...], folder: Path, tmp_path: Path) -> None:
    tuning = {"model": str(folder / "learned"), "data": {"text": str(folder / "text.txt")}, "train": [train]}
    tuning |= {"steps": 2, "batch": 4, "length": 8, "learning_rate": 0.01}
    (tmp_path / "tune.yaml").write_text(json.dumps(tuning), encoding="utf-8")
    result = moerge("tune", tmp_path / "tune.yaml", tmp_path / "tuned")
    assert result.code == 0, result.err
    before, after = read_tensors(folder / "learned"), read_tensors(tmp_path / "tuned")
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed and all(name.startswith(trained) for name in changed), changed
    assert moerge("verify", tmp_path / "tuned").code == 0


def test_its_gate_is_balanced_and_a_teacher_is_followed(folder: Path, tmp_path: Path) -> None:
    """With one expert for each sequence the language loss says nothing about the gate, and balance does."""
    path, teacher = str(folder / "text.txt"), str(folder / "llama")
    tuning = {"model": str(folder / "learned"), "data": {"text": path}, "train": ["router", "projectors"]}
    tuning |= {"steps": 2, "batch": 4, "length": 8, "learning_rate": 0.01}
    losses = {"distillation": {"weight": 1.0}, "load_balance": 1.0, "router_z": 0.1}
    gates = []
    for out, more in {
        "plain": {},
        "balanced": {"losses": losses, "data": {"text": {"path": path, "teacher": teacher}}},
    }.items():
        (tmp_path / "tune.yaml").write_text(json.dumps({**tuning, **more}), encoding="utf-8")
        result = moerge("tune", tmp_path / "tune.yaml", tmp_path / out)
        assert result.code == 0, result.err
        gates.append(read_tensors(tmp_path / out)["router.weight"])
    rows = [json.loads(line) for line in (tmp_path / "balanced" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"distillation", "load_balance", "router_z"} <= rows[0].keys()
    assert all(1 <= row["load_balance"] <= 2 and row["router_z"] > 0 and row["distillation"] > 0 for row in rows)
    assert (gates[0] != gates[1]).any()


def test_what_it_has_not_cannot_be_tuned(folder: Path, tmp_path: Path) -> None:
    tuning = {"model": str(folder / "learned"), "data": {"text": str(folder / "text.txt")}, "steps": 1, "length": 8}
    for settings, message in (
        ({"train": ["experts.olmo2"]}, "experts.olmo2"),
        ({"losses": {"distillation": {"weight": 1, "hidden": 1}}}, "has no teacher"),
    ):
        (tmp_path / "tune.yaml").write_text(json.dumps({**tuning, **settings}), encoding="utf-8")
        result = moerge("tune", tmp_path / "tune.yaml", tmp_path / "tuned")
        assert result.code == 2 and message in result.err and len(result.err.splitlines()) == 1, result.err


def test_a_report_has_it(folder: Path) -> None:
    result = moerge("report", folder)
    assert result.code == 0, result.err
    assert "moerge_heterogeneous" in (folder / "report.html").read_text(encoding="utf-8")
