"""`moerge eval` from end to end on tiny models: figures, files, resuming, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from moerge.evaluation import run as running
from tests.evaluation.problems import write_problems
from tests.helpers.command import moerge as command

pytest.importorskip("torch", reason="needs moerge[models]")

pytestmark = pytest.mark.slow

DOCUMENTS = {
    "math": [" ".join(f"w{3 + (7 * index + start) % 61}" for index in range(9 + start)) for start in range(6)],
    "code": ["w3 w4 w5 w6 w7", "w50 w40 w30"],
}


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the texts, and the checkpoints by their names."""
    for name, documents in DOCUMENTS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    for name in ("base", "math", "routed"):
        (tmp_path / name).symlink_to(checkpoints / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TEXTS = ("--perplexity", "math=math.jsonl", "--perplexity", "code=code.jsonl")


def done(*arguments: object) -> Any:
    result = command("eval", *arguments, "--json")
    runs_code = "--allow-code-execution" in arguments
    assert (result.code, len(result.err.splitlines())) == (0, int(runs_code)), result.err
    assert ("generated code runs" in result.err) == runs_code
    return result.json


def refused(*arguments: object) -> str:
    result = command("eval", *arguments)
    assert (result.code, result.out) == (2, ""), result
    assert len(result.err.splitlines()) == 1
    return result.err.removeprefix("moerge: ").strip()


def scores(found: Any) -> dict[tuple[str, str, str], dict[str, Any]]:
    listed = [score for measure in found["measures"] for score in measure["scores"]]
    return {(score["checkpoint"], score["on"], score["metric"]): score for score in listed}


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_perplexity(folder: Path) -> None:
    found = done("base", "math", *TEXTS, "--out", "out")
    assert set(scores(found)) == {
        (name, on, metric) for name in ("base", "math") for on in DOCUMENTS for metric in ("perplexity", "bits_per_byte")
    }
    for measure in found["measures"]:
        documents = rows(folder / "out" / measure["documents_file"])
        assert [row["bytes"] for row in documents] == [len(text) for text in DOCUMENTS[measure["on"]]]
        nats, tokens, count = (sum(row[key] for row in documents) for key in ("nats", "tokens", "bytes"))
        assert [score["value"] for score in measure["scores"]] == pytest.approx(
            [math.exp(nats / tokens), nats / count / math.log(2)]
        )
        assert all(score["low"] < score["value"] < score["high"] for score in measure["scores"])
        assert {score["documents"] for score in measure["scores"]} == {len(documents)}
    bits = {key[:2]: score["value"] for key, score in scores(found).items() if key[2] == "bits_per_byte"}
    assert [(row["checkpoint"], row["against"], row["on"], row["metric"]) for row in found["differences"]] == [
        ("math", "base", on, "nats_per_byte") for on in DOCUMENTS
    ]
    for row in found["differences"]:
        assert row["value"] == pytest.approx((bits["math", row["on"]] - bits["base", row["on"]]) * math.log(2))
        assert row["low"] <= row["value"] <= row["high"]
    assert json.loads((folder / "out/results.json").read_text()) == found
    assert len(table(folder / "out/results.csv")) == 8
    assert [row["against"] for row in table(folder / "out/differences.csv")] == ["base", "base"]
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "differences.csv",
        "documents",
        "results.csv",
        "results.json",
    ]


def test_the_table(folder: Path) -> None:
    result = command("eval", "base", "math", *TEXTS, "--limit", 2)
    assert result.code == 0, result
    number = r"-?\+?\d+\.\d+"
    quiet = command("eval", "base", "math", *TEXTS, "--limit", 2, "--quiet")
    assert (quiet.code, quiet.out) == (0, "")
    text = " ".join(result.out.split())
    assert re.search(rf"perplexity math code base {number} ± {number} {number} ± {number} math ", text), text
    assert "± standard error (bootstrap over documents); documents: math 2, code 2" in text
    assert re.search(rf"less base math code math [+-]{number} \([+-]{number} to [+-]{number}\)", text), text


def test_a_sequence_routed_model_sets_what_is_given_for_all(folder: Path) -> None:
    found = done("base", "routed", "--perplexity", "math=math.jsonl", "--given", 10)
    assert found["settings"]["texts"]["math"]["given_characters"] == 10
    counted = [len(text) - text.index(" ", 10) for text in DOCUMENTS["math"]]
    assert refused("base", "routed", "--perplexity", "math=math.jsonl") == (
        "--perplexity math: no document of math.jsonl goes on behind the 256 characters that are given: choose a smaller --given"
    )
    for name in ("base", "routed"):
        assert scores(found)[name, "math", "perplexity"]["documents"] == len(counted)
    assert refused("routed", "--perplexity", "math=math.jsonl", "--given", 0) == (
        "--given 0: routed routes by the beginning of a document: give it some characters that are not predicted"
    )


def test_documents_that_are_too_short_are_left_out_and_counted(folder: Path) -> None:
    result = command("eval", "math", "--perplexity", "code=code.jsonl", "--given", 9)
    assert result.code == 0
    assert (
        result.err
        == "warning: code: 1 of 2 documents of code.jsonl end within the 9 characters that are given and were left out\n"
    )
    assert "documents: code 1" in result.out


def test_calibration_text_is_refused(folder: Path, checkpoints: Path) -> None:
    import moerge
    from tests.helpers.tiny import write_recipe

    (checkpoints / "seen.txt").write_text(DOCUMENTS["math"][0])
    moe, seen = {"router": {"kind": "hidden"}}, str(checkpoints / "seen.txt")
    recipe = write_recipe(
        checkpoints, "calibrated.yaml", moe=moe, calibration=dict.fromkeys(("base", "math", "code", "knowledge"), seen)
    )
    moerge.merge(recipe, folder / "calibrated", threads=1)
    message = "text 'math' (math.jsonl): calibrated was calibrated on 1 of its 6 documents, so figures on them are no evidence"
    options = ("math", "calibrated", *TEXTS)
    assert refused(*options) == f"{message}: name other text, or go on with --allow-calibration-text"
    result = command("eval", *options, "--allow-calibration-text")
    assert (result.code, result.err) == (0, f"warning: {message}\n")


def test_resuming(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = done("base", "math", *TEXTS, "--out", "whole")
    loaded = []
    load = running.load

    def dying(name: str, **options: Any) -> Any:
        loaded.append(name)
        if name == "math":
            raise KeyboardInterrupt
        return load(name, **options)

    monkeypatch.setattr(running, "load", dying)
    killed = command("eval", "base", "math", *TEXTS, "--out", "out")
    assert (killed.code, killed.err) == (130, "moerge: interrupted; continue with the same command and --resume\n")
    assert {score[0] for score in scores(json.loads((folder / "out/results.json").read_text()))} == {"base"}
    monkeypatch.setattr(running, "load", lambda name, **options: loaded.append(name) or load(name, **options))
    assert refused("base", "math", *TEXTS, "--out", "out") == (
        "out holds results already: go on with --resume, or name another folder with --out"
    )
    resumed = done("base", "math", *TEXTS, "--out", "out", "--resume")
    assert loaded == ["base", "math", "math"]
    assert scores(resumed) == scores(whole)
    assert resumed["differences"] == whole["differences"]
    fewer = done("base", "math", *TEXTS, "--out", "out", "--resume", "--limit", 1)  # something else: not taken from there
    assert loaded[3:] == ["base", "math"]
    assert {measure["scores"][0]["documents"] for measure in fewer["measures"]} == {1}


def test_damaged_results_are_refused(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out/results.json").write_text('{"measures": [{}]}')
    assert refused("base", *TEXTS, "--out", "out", "--resume") == (
        "out/results.json is damaged, or another moerge wrote it: name another folder with --out"
    )


@pytest.fixture
def bench_folder(folder: Path) -> Path:
    pytest.importorskip("lm_eval", reason="needs moerge[eval]")
    return write_problems(folder / "bench")


def test_a_benchmark(bench_folder: Path) -> None:
    found = done("base", "routed", "--tasks", "nq,humaneval", "--data", "bench", "--limit", 2, "--max-new-tokens", 4,
                 "--out", "out", "--allow-code-execution")  # fmt: skip
    listed = scores(found)
    assert set(listed) == {
        (name, *rest) for name in ("base", "routed") for rest in (("nq", "exact_match"), ("humaneval", "pass@1"))
    }
    assert {(score["value"], score["documents"]) for score in listed.values()} == {(0.0, 1)}
    settings = found["settings"]["benchmarks"]["nq"]
    assert (settings["num_fewshot"], settings["questions"], settings["generation_kwargs"]) == (
        5, 1, {"until": ["\n"], "do_sample": False, "max_gen_toks": 4},
    )  # fmt: skip
    assert {"moerge", "python", "torch", "transformers", "lm_eval"} <= set(found["versions"])
    (row,) = rows(bench_folder.parent / "out" / found["measures"][0]["documents_file"])
    assert (row["document"], row["correct"]) == (0, False)
    assert row["answer"] == row["response"].strip() != ""
    assert done("base", "routed", "--tasks", "nq,humaneval", "--data", "bench", "--limit", 2, "--max-new-tokens", 4,
                "--out", "out", "--allow-code-execution", "--resume") == found  # fmt: skip


def test_prompts_that_do_not_fit_are_counted(bench_folder: Path) -> None:
    result = command("eval", "math", "--tasks", "gsm8k", "--data", "bench", "--max-new-tokens", 4)
    assert result.code == 0
    assert result.err == (
        "warning: gsm8k: 3 of 3 prompts did not fit into the 128 tokens of math and lost their beginning, "
        "so the figures are too low\n"
    )
    assert "gsm8k 3" in result.out


def test_code_runs_only_with_leave(bench_folder: Path) -> None:
    assert refused("math", "--tasks", "gsm8k,mbpp,humaneval", "--data", "bench") == (
        "--tasks mbpp,humaneval: programs that the model writes are run to judge them: allow that with --allow-code-execution, "
        "best in a container"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("math",), "nothing to measure: name benchmarks with --tasks, or text with --perplexity DOMAIN=FILE"),
        (("math", "math", *TEXTS), "the checkpoint math is there twice: name each one once"),
        (
            ("math", "--perplexity", "math.jsonl"),
            "--perplexity 'math.jsonl': should be DOMAIN=FILE, such as math=heldout/math.jsonl",
        ),
        (
            ("math", *TEXTS, "--perplexity", "code=math.jsonl"),
            "--perplexity: the domain 'code' is there twice: give one folder or glob instead",
        ),
        (("math", "--perplexity", "a=none.txt"), "--perplexity a: there is no file or folder none.txt: check the path"),
        (("none/at/all", *TEXTS), "there is no checkpoint folder none/at/all: check the path"),
        (("math", *TEXTS, "--resume"), "--resume needs the folder of the interrupted run: name it with --out"),
        (("math", *TEXTS, "--out", "math.jsonl"), "math.jsonl is a file: name another folder with --out"),
        (("math", *TEXTS, "--window", 129), "math reads 128 tokens at once: choose a --window of at most so many"),
    ],
)
def test_refuses(folder: Path, arguments: tuple[object, ...], message: str) -> None:
    assert refused(*arguments) == message


def test_benchmarks_without_the_harness(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    assert refused("math", "--tasks", "nq").startswith("a benchmark needs lm_eval")
    assert refused("math", "--tasks", "nq").endswith(": pip install 'moerge[models,eval]'")
    assert command("eval", "math", *TEXTS, "--limit", 1).code == 0  # text needs no harness
