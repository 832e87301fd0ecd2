"""Questions from files and from a Hub that is played by a function; what is wrong with a file is said in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moerge.errors import InputError
from moerge.evaluation.benchmarks import BENCHMARKS, parse_tasks
from moerge.evaluation.data import load_questions
from tests.evaluation.problems import write_problems


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_problems(tmp_path / "bench")


def test_mbpp_is_its_test_split(data: Path) -> None:
    assert len(load_questions(BENCHMARKS["mbpp"], data).rows) == 2  # of the tasks 1, 10, 11, 510 and 511


def test_examples_are_the_first_with_one_short_answer(data: Path) -> None:
    examples = load_questions(BENCHMARKS["nq"], data).examples
    assert [row["question"] for row in examples] == [f"shot {number}" for number in range(5)]


def test_answers_without_repetition(data: Path) -> None:
    (data / "triviaqa/validation.jsonl").write_text(json.dumps({"question": "?", "answer": ["a", "", "b", "a"]}))
    assert load_questions(BENCHMARKS["triviaqa"], data).rows == [{"question": "?", "answers": ["a", "b"]}]


def test_zstandard_is_the_same_as_plain(data: Path) -> None:
    zstandard = pytest.importorskip("zstandard", reason="needs moerge[eval]")
    plain = load_questions(BENCHMARKS["gsm8k"], data)
    path = data / "gsm8k/test.jsonl"
    path.with_name("test.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(path.read_bytes()))
    path.unlink()
    packed = load_questions(BENCHMARKS["gsm8k"], data)
    assert (packed.rows, packed.digest) == (plain.rows, plain.digest)
    path.with_name("test.jsonl.zst").write_bytes(b"not packed at all")
    with pytest.raises(InputError, match=r"^cannot unpack .*test\.jsonl\.zst: "):
        load_questions(BENCHMARKS["gsm8k"], data)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("gsm8k", "gsm8k/test.jsonl", '{"question": "?"}', "line 1: gsm8k needs the field 'answer', of type str"),
        ("gsm8k", "gsm8k/test.jsonl", "[]", "line 1: should be an object with the fields question, answer"),
        ("gsm8k", "gsm8k/test.jsonl", "\n{", "line 2: not valid JSON: "),
        ("gsm8k", "gsm8k/test.jsonl", "\n", "holds no question of GSM8K: check the file"),
        ("gsm8k", "gsm8k/test.jsonl", b"\xff", "is not UTF-8 text: save it as such"),
        ("mbpp", "mbpp/mbpp.jsonl", '{"task_id": "x"}', "line 1: mbpp needs the field 'task_id', of type int"),
        (
            "nq",
            "nq_open/validation.jsonl",
            '{"question": "?", "answer": "x"}',
            "line 1: 'answer' should be a list of accepted answers",
        ),
        (
            "nq",
            "nq_open/validation.jsonl",
            '{"question": "?", "answer": [""]}',
            "line 1: 'answer' should be a list of accepted answers",
        ),
        (
            "triviaqa",
            "triviaqa/train_subset.jsonl",
            '{"question": "?", "answer": ["a", "b"]}',
            "needs 5 examples with a single short answer: ",
        ),
    ],
)
def test_faulty_files(data: Path, name: str, file: str, content: str | bytes, message: str) -> None:
    (data / file).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as raised:
        load_questions(BENCHMARKS[name], data)
    assert message in str(raised.value)
    assert str(data) in str(raised.value)


def test_a_missing_file_is_named_with_all_its_names(tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        load_questions(BENCHMARKS["mbpp"], tmp_path)
    names = [str(tmp_path / "mbpp" / name) for name in ("test.jsonl.zst", "mbpp.jsonl", "mbpp.jsonl.zst")]
    assert str(raised.value) == f"--data: MBPP needs the file {tmp_path}/mbpp/test.jsonl (or {', '.join(names)})"


HUB: dict[str, Any] = {
    "openai/gsm8k": {("main", "test"): [{"question": "?", "answer": "#### 1"}]},
    "EleutherAI/hendrycks_math": {
        (subject, "test"): [{"problem": subject, "solution": "\\boxed{1}", "level": "Level 1", "type": "x"}]
        for subject in BENCHMARKS["math"].source[1]
    },
    "google-research-datasets/mbpp": {
        ("full", "test"): [
            {"task_id": 11, "text": "?", "code": "x", "test_list": ["x"], "test_setup_code": "", "challenge_test_list": []}
        ]
    },
    "openai/openai_humaneval": {
        (None, "test"): [{"task_id": "HumanEval/0", "prompt": "", "canonical_solution": "", "test": "", "entry_point": "f"}]
    },
    "google-research-datasets/nq_open": {
        (None, "validation"): [{"question": "?", "answer": ["a"]}],
        (None, "train"): [{"question": "?", "answer": ["a"]}] * 7,
    },
    "mandarjoshi/trivia_qa": {
        ("unfiltered.nocontext", split): [
            {"question": "?", "question_id": "1", "answer": {"value": "A b", "aliases": ["A b", *more]}}
        ]
        * 5
        for split, more in (("validation", ["ab"]), ("train", []))
    },
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_hub_gives_the_same_shapes(name: str, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs moerge[eval]")

    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, split: HUB[path][name, split])
    online, local = load_questions(BENCHMARKS[name], None), load_questions(BENCHMARKS[name], data)
    assert set(online.rows[0]) == set(local.rows[0])
    assert len(online.examples) == len(local.examples) == (5 if name in ("nq", "triviaqa") else 0)
    if name == "math":
        assert [row["problem"] for row in online.rows] == list(BENCHMARKS["math"].source[1])
    if name == "triviaqa":
        assert online.rows[0]["answers"] == ["A b", "ab"]


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs moerge[eval]")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        InputError, match=r"^cannot get openai/gsm8k from the Hub \(no network\): give local files with --data DIR$"
    ):
        load_questions(BENCHMARKS["gsm8k"], None)


def test_task_names() -> None:
    ours, others = parse_tasks("nq, mmlu, gsm8k")
    assert ([benchmark.name for benchmark in ours], others) == (["nq", "gsm8k"], ("mmlu",))
    with pytest.raises(InputError, match=r"^--tasks: 'nq' is there twice: name each benchmark once$"):
        parse_tasks("nq,nq")
    with pytest.raises(InputError, match=r"^--tasks names no benchmark: known: gsm8k, math, mbpp, humaneval, nq, triviaqa$"):
        parse_tasks(" , ")
