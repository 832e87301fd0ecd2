"""Benchmarks as the harness runs them: the paper's shots, the harness's prompts, all points for solutions, none for silence."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from moerge.evaluation.benchmarks import BENCHMARKS
from moerge.evaluation.data import Questions, load_questions
from moerge.evaluation.harness import _Loader, prompt_settings, run_task
from tests.evaluation.problems import SOLUTIONS, write_problems

lm_eval = pytest.importorskip("lm_eval", reason="needs moerge[eval]")

pytestmark = pytest.mark.slow

SHOTS = {"gsm8k": 8, "math": 4, "mbpp": 0, "humaneval": 0, "nq": 5, "triviaqa": 5}
QUESTION = {"gsm8k": "Q: ", "math": "Problem:", "mbpp": "[BEGIN]", "humaneval": "def ", "nq": "Q: ", "triviaqa": "Question: "}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_problems(tmp_path_factory.mktemp("bench"))


def scripted(answer: Callable[[Mapping[str, Any]], str]) -> Any:
    from tests.evaluation.scripted import Scripted

    return Scripted(answer)


def verdicts(model: Any, questions: Questions, **options: Any) -> list[bool]:
    samples = run_task(model, questions, max_new_tokens=512, **options)
    assert [sample.number for sample in samples] == list(range(len(samples)))
    return [sample.verdict.correct for sample in samples]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_solutions_get_all_points_and_silence_none(name: str, data: Path) -> None:
    questions = load_questions(BENCHMARKS[name], data)
    oracle = scripted(SOLUTIONS[name])
    assert verdicts(oracle, questions) == [True] * len(questions.rows)
    assert verdicts(scripted(lambda document: ""), questions) == [False] * len(questions.rows)
    assert [prompt.count(QUESTION[name]) - 1 for prompt in oracle.prompts] == [SHOTS[name]] * len(questions.rows)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_real_solutions_get_all_points_and_silence_none(name: str, bench: Path) -> None:
    pytest.importorskip("zstandard", reason="needs moerge[eval]")
    questions = load_questions(BENCHMARKS[name], bench)
    assert verdicts(scripted(SOLUTIONS[name]), questions, limit=12) == [True] * 12
    assert verdicts(scripted(lambda document: ""), questions, limit=12) == [False] * 12


def test_samples_keep_prompt_response_and_verdict(data: Path) -> None:
    answers = iter([" The answer is 1197.", " The answer is 4.", " So 3 / 2 = 1.5"])
    samples = run_task(scripted(lambda document: next(answers)), load_questions(BENCHMARKS["gsm8k"], data), max_new_tokens=9)
    assert [(sample.verdict.correct, sample.verdict.answer) for sample in samples] == [
        (True, "1197"),
        (False, "4"),
        (True, "1.5"),
    ]
    assert samples[1].response == " The answer is 4."
    assert samples[1].prompt.endswith("Q: It is 5 degrees and gets 9 colder. How warm is it?\nA:")


def test_knowledge_prompts(data: Path) -> None:
    model = scripted(SOLUTIONS["nq"])
    verdicts(model, load_questions(BENCHMARKS["nq"], data))
    shots = "".join(f"Q: shot {number}?\nA: answer {number}\n" for number in range(5))
    assert model.prompts == [f"Answer these questions:\n\n{shots}Q: who wrote it?\nA:"]


def harness_file(path: str) -> dict[str, Any]:
    return yaml.load((Path(lm_eval.__file__).parent / "tasks" / path).read_text(), _Loader)


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "math"])
def test_prompts_are_the_harness_s(name: str) -> None:
    theirs, ours = harness_file(BENCHMARKS[name].task), prompt_settings(BENCHMARKS[name], 512)
    assert ours["doc_to_text"] == theirs["doc_to_text"]
    assert ours["num_fewshot"] == SHOTS[name]
    stops = ["\n"] if name in ("nq", "triviaqa") else theirs["generation_kwargs"]["until"]
    assert ours["generation_kwargs"] == {"until": stops, "do_sample": False, "max_gen_toks": 512}


def test_math_is_minerva_s() -> None:
    source = (Path(lm_eval.__file__).parent / "tasks/minerva_math/utils.py").read_text()
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    written = functions["list_fewshot_samples"].body[0]
    assert isinstance(written, ast.Return) and written.value is not None
    theirs = [{key: sample[key] for key in ("problem", "solution")} for sample in ast.literal_eval(written.value)]
    ours = prompt_settings(BENCHMARKS["math"], 512)
    assert ours["fewshot_config"]["samples"] == theirs
    assert ast.unparse(functions["doc_to_text"].body[0]) == "return 'Problem:' + '\\n' + doc['problem'] + '\\n\\n' + 'Solution:'"
    assert ours["doc_to_text"] == "Problem:\n{{problem}}\n\nSolution:"


def test_no_code_of_the_harness_s_tasks_is_loaded() -> None:
    assert yaml.load("{a: !function utils.pass_at_1, b: 1}", _Loader) == {"a": None, "b": 1}
