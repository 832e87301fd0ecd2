"""Benchmarks as tasks of lm-evaluation-harness: its prompts, its examples, its loop; our data, and our verdicts.

The harness's own verdicts are not used: its code benchmarks need a network to import and run what a model wrote in the
evaluating process's reach, and some of its answer patterns let an empty response score, or a right one not.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from moerge.errors import InputError
from moerge.evaluation.answers import Document, Verdict
from moerge.evaluation.benchmarks import Benchmark
from moerge.evaluation.data import Questions
from moerge.extras import require

_OWN = Path(__file__).parent / "tasks"
_PROMPT = ("doc_to_text", "doc_to_target", "description", "target_delimiter", "fewshot_delimiter", "fewshot_config")
_SCORE = "correct"


@dataclass(frozen=True)
class Sample:
    """One question: the prompt, what the model wrote, and the verdict. `number` counts from 0 in the order of the file."""

    number: int
    prompt: str
    response: str
    verdict: Verdict


def require_harness() -> None:
    """Import the harness; InputError where it is not installed."""
    with quiet():
        require("models,eval", "a benchmark", "lm_eval.api.task", "lm_eval.evaluator")


def prompt_settings(benchmark: Benchmark, max_new_tokens: int) -> dict[str, Any]:
    """The part of the harness's configuration that decides what a model reads, and when it is made to stop."""
    written = _task_file(benchmark)
    config = {key: written[key] for key in _PROMPT if key in written}
    overrides = dict(benchmark.overrides)
    stops = overrides.pop("until", None) or written["generation_kwargs"]["until"]
    generation = {"until": list(stops), "do_sample": False, "max_gen_toks": max_new_tokens}
    if benchmark.examples:
        config["doc_to_target"] = "{{answers[0]}}"
    return {**config, **overrides, "num_fewshot": benchmark.shots, "generation_kwargs": generation}


def _task_file(benchmark: Benchmark) -> dict[str, Any]:
    import lm_eval

    path = _OWN / benchmark.task
    if not path.exists():
        path = Path(str(lm_eval.__file__)).parent / "tasks" / benchmark.task
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError:
        raise InputError(
            f"the installed lm_eval has no task {benchmark.task}: pip install 'moerge[eval]'", code="missing-extra"
        ) from None
    return dict(loaded)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which the harness's `!function name` is nothing: no code is loaded from there."""


_Loader.add_constructor("!function", lambda loader, node: None)


def make_task(questions: Questions, max_new_tokens: int, process_results: Callable[..., Mapping[str, float]]) -> Any:
    """The harness's task over these questions; `process_results` is its hook for scoring a response."""
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    benchmark = questions.benchmark
    splits = {"questions": Dataset.from_list(questions.rows)}
    config = prompt_settings(benchmark, max_new_tokens)
    config |= {key: _compiled(config[key]) for key in ("doc_to_text", "doc_to_target")}
    if questions.examples:
        splits["examples"] = Dataset.from_list(questions.examples)
        config |= {"training_split": "examples", "fewshot_split": "examples"}
    config |= {
        "task": f"moerge_{benchmark.name}",
        "output_type": "generate_until",
        "test_split": "questions",
        "custom_dataset": lambda **_: splits,
        "process_results": process_results,
        "metric_list": [{"metric": _SCORE, "aggregation": "mean", "higher_is_better": True}],
    }
    with quiet():
        return ConfigurableTask(config=config)


def run_task(
    model: Any, questions: Questions, *, max_new_tokens: int, limit: int | None = None, chat: bool = False
) -> list[Sample]:
    """Ask `model`, one of the harness's `LM`, the first `limit` questions, and judge what it answers.

    With `chat` the examples are turns of a conversation that ends with the question.
    """
    from lm_eval.evaluator import evaluate

    name, judge = f"moerge_{questions.benchmark.name}", questions.benchmark.judge
    verdicts: dict[int, Verdict] = {}

    def process(document: Document, responses: list[str]) -> Mapping[str, float]:
        verdict = judge(document, responses[0])
        verdicts[len(verdicts)] = verdict
        return {_SCORE: float(verdict.correct)}

    task = make_task(questions, max_new_tokens, process)
    with quiet():
        asked: dict[str, Any] = {"apply_chat_template": True, "fewshot_as_multiturn": True} if chat else {}
        found = evaluate(lm=model, task_dict={name: task}, limit=limit, bootstrap_iters=0, log_samples=True, **asked)
    samples = found["samples"][name]
    return [
        Sample(sample["doc_id"], sample["arguments"][0][0], sample["resps"][0][0], verdicts[index])
        for index, sample in enumerate(samples)
    ]


def _compiled(template: str) -> Callable[[Document], str]:
    """The template as a function: the harness would compile it anew for every example of every question."""
    from lm_eval.utils import env

    render = env.from_string(template).render
    return lambda document: str(render(**document))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's log messages and progress bars: those about our data say nothing that a user can act on."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
