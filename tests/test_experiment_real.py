"""The experiment on a pretrained model: its text, its recipes, what it compares and what it writes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import moerge
from tests.helpers.tiny import make_models, read_values

pytest.importorskip("zstandard")

from experiments.real import curves, measuring, questions, report, rows, settings, text, whole


def pack(path: Path, lines: list[dict[str, object]]) -> None:
    import zstandard

    path.parent.mkdir(parents=True, exist_ok=True)
    with zstandard.open(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def work(tmp_path: Path) -> settings.Work:
    """Tiny models and their calibration text where the experiment puts them."""
    work = settings.Work(tmp_path / "work")
    models = make_models(tmp_path)
    work.root.mkdir()
    models["base"].rename(work.base)
    for expert in settings.EXPERTS:
        work.expert(0, expert).parent.mkdir(parents=True, exist_ok=True)
        models[expert].rename(work.expert(0, expert))
    for domain in settings.DOMAINS:
        work.text(domain, "calibration").parent.mkdir(parents=True)
        work.text(domain, "calibration").write_text(json.dumps({"text": "w3 w4 w5 w6"}) + "\n")
    return work


def test_text_is_cut_into_documents_that_no_two_splits_share(tmp_path: Path) -> None:
    long = [{"text": f"long {i}\n" * 300, "source": "book"} for i in range(90)]
    short = [{"text": f"short {i} " * 20, "source": "quiz"} for i in range(600)]
    for domain in settings.DOMAINS:
        pack(tmp_path / "corpus" / domain / "train.jsonl.zst", [*long, *short])
        pack(tmp_path / "corpus" / domain / "valid.jsonl.zst", long[:3])
    work = settings.Work(tmp_path / "work")
    text.write_text(tmp_path / "corpus", work, (0, 1), per_source=50)

    def read(split: str) -> list[tuple[str, str]]:
        lines = work.text("math", split).read_text().splitlines()
        return [(row["text"], row["source"]) for row in map(json.loads, lines)]

    calibration, first, second = read("calibration"), read("train-0"), read("train-1")
    every = calibration + first
    assert {len(document) for document, _ in every} == {text.DOCUMENT_CHARACTERS}
    assert max(sum(source == each for _, source in every) for each in ("book", "quiz")) == 50
    assert len(calibration) == text.CALIBRATION
    assert not set(calibration) & set(first)
    assert first != second
    assert sorted(first) == sorted(second)
    assert len(read("valid")) == 3


@pytest.mark.parametrize("name", rows.MIXTURES)
def test_every_mixture_can_be_planned(name: str, work: settings.Work) -> None:
    plan = moerge.plan(rows.recipe(work, 0, rows.MIXTURES[name]))
    assert plan.recipe.moe is not None
    assert plan.recipe.moe.top_k == (1 if "top 1" in name else 2)


def test_a_merge_has_the_scale_that_is_asked_for_and_is_made_once(work: settings.Work) -> None:
    row = rows.Row({**rows.DENSE["task arithmetic"], "scale": 0.6})
    out = rows.merged(work, 0, "task arithmetic, scale 0.6", row)
    base, *experts = (read_values(folder) for folder in (work.base, *(work.expert(0, name) for name in settings.EXPERTS)))
    for name, value in read_values(out).items():
        expected = base[name] + 0.6 * sum(expert[name] - base[name] for expert in experts)
        np.testing.assert_allclose(value, expected, rtol=2**-8, atol=1e-6)
    (out / "model.safetensors").write_bytes(b"")
    assert rows.merged(work, 0, "task arithmetic, scale 0.6", row) == out
    assert not (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", whole.ROWS)
def test_whole_mixtures_have_the_odd_expert_or_do_without_mathematics(name: str, work: settings.Work) -> None:
    recipe = whole.assembled(work, 0, whole.ROWS[name], work.expert(0, "math"))
    assert set(recipe["experts"]) == {"code", "knowledge", *([whole.ODD] if whole.ROWS[name].odd else [])}
    moerge.plan(recipe)
    budget = settings.BUDGETS["smoke"]
    assert ("math" in whole.tuning(work, budget, 0, whole.ROWS[name], work.base)["data"]) == ("no math" not in name)


def test_tuning_weights_are_what_base_and_experts_were_trained_on() -> None:
    assert curves.weights() == pytest.approx({"general": 0.4, "math": 0.2, "code": 0.2, "knowledge": 0.2})


def documents(factor: float) -> measuring.Documents:
    draw = np.random.default_rng(0)
    return {domain: [[factor * float(nats), 100.0, 400.0] for nats in draw.uniform(200, 300, 20)] for domain in settings.DOMAINS}


def test_bits_and_differences_are_those_of_sums_over_documents() -> None:
    base, better = documents(1), documents(0.9)
    better["math"] = [[nats - 5 * (index % 3), *rest] for index, (nats, *rest) in enumerate(better["math"])]
    bits = {
        name: sum(nats for nats, _, _ in found["math"]) / (20 * 400) / math.log(2)
        for name, found in (("base", base), ("better", better))
    }
    assert measuring.bits(base)["math"] == pytest.approx(bits["base"])
    found = measuring.against(better, base, "math")
    assert found.value == pytest.approx(100 * (1 - bits["better"] / bits["base"]))
    assert found.low < found.value < found.high
    mean = measuring.against(better, base, "mean")
    assert mean.value == pytest.approx(100 * (1 - measuring.bits(better)["mean"] / measuring.bits(base)["mean"]))
    assert measuring.against(base, base, "mean").high == pytest.approx(0)


def test_lost_is_the_part_of_a_lead_that_a_merge_does_not_have() -> None:
    found = {"base": documents(1), "math expert": documents(0.8), "merge": documents(0.95)}
    assert measuring.lost(found, "math expert", "merge", "math") == pytest.approx(75)


def test_questions_are_a_prompt_and_a_solution_with_examples_before_short_ones(tmp_path: Path) -> None:
    asked = [{"question": f"q{i}", "answer": [f"a{i}"]} for i in range(7)]
    pack(tmp_path / "nq_open" / "validation.jsonl.zst", asked[5:])
    pack(tmp_path / "nq_open" / "train_subset.jsonl.zst", asked[:6])
    code = {"text": "Add.", "code": "def f():\r\n\treturn 1\r\n", "test_list": ["assert f() == 1"]}
    pack(tmp_path / "mbpp" / "mbpp.jsonl.zst", [code])
    (prompt, answer), _ = questions.pairs(tmp_path, "NQ", 2)
    assert prompt.count("Answer: a") == questions.SHOTS
    assert (prompt.splitlines()[-2:], answer) == (["Question: q5", "Answer:"], " a5")
    ((prompt, solution),) = questions.pairs(tmp_path, "MBPP", 1)
    assert prompt == prompt.rstrip()
    assert solution == "\ndef f():\n\treturn 1"


def test_report_has_every_step_that_has_results(tmp_path: Path) -> None:
    found = {name: documents(factor) for name, factor in (("base", 1), ("math expert", 0.8), ("dense: average", 0.95))}
    scales = {"TIES": {"0.3333": 1.1, "1.0": 1.2}}
    curve = [[0, 20.0], [100, 10.0]]
    steps = {
        "2": {"documents": found, "scales": scales},
        "3": {"curves": {"1e-05": {"BTX: average": curve, "TIES": curve}}},
        "6": {
            "documents": found,
            "scales": scales,
            "learning": {"Expert Merging": {"seconds": 3.0, "peak_gigabytes": 1.0, "coefficients": {"math": 0.5}}},
        },
        "4": {
            "advice": "merge them",
            "verdicts": [{"role": "ffn", "answer": "merge", "reason": "near"}],
            "experts": ["base", "math"],
            "routing": {"TIES, ridge router": {"GSM8K": [0.25, 0.75]}},
        },
    }
    for step, content in steps.items():
        (tmp_path / f"step-{step}-seed-0.json").write_text(json.dumps(content))
    report.write(tmp_path)
    written = (tmp_path / "real.md").read_text()
    assert "| dense: average | 1 |" in written
    assert "| GSM8K | 25 % | 75 % |" in written
    assert "| Expert Merging | 0.50 | 3.0 | 1.0 |" in written
    assert "merge them" in written
    assert "Learning rate 1e-05" in written
