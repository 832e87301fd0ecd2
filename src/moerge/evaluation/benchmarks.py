"""The six benchmarks of the MergeME paper (section 4.1), with its settings (appendix A).

The paper gives the number of examples in the prompt, greedy decoding, and at most 512 new tokens. It gives neither prompts nor
examples: these are lm-evaluation-harness's. Where something differs from the harness's task of that name, it stands here as an
override, and docs/evaluation.md says why.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moerge.errors import InputError
from moerge.evaluation import answers
from moerge.evaluation.answers import Document, Verdict

MAX_NEW_TOKENS = 512
"""Of the paper."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    `task` is the harness's task whose prompt it takes, a file below `lm_eval/tasks`, or one of ours in `tasks/`. `overrides`
    replace keys of it. `files` are names that the questions' file may have in `--data DIR`, without ending, and `examples` those
    of the file that examples come from, where the task does not bring them along. `source` is where the Hub has it: the
    repository, its configurations, and the split. One that `continues` its prompt has no question to ask in a chat template.
    """

    name: str
    title: str
    domain: str
    metric: str
    shots: int
    task: str
    judge: Callable[[Document, str], Verdict]
    files: tuple[str, ...]
    source: tuple[str, tuple[str | None, ...], str]
    examples: tuple[str, ...] = ()
    examples_split: str | None = None
    runs_code: bool = False
    continues: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


_FIRST = {"sampler": "first_n"}
_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

_ALL = (
    Benchmark(
        name="gsm8k",
        title="GSM8K",
        domain="math",
        metric="exact_match",
        shots=8,
        task="gsm8k/gsm8k-cot.yaml",
        judge=answers.gsm8k,
        files=("gsm8k/test",),
        source=("openai/gsm8k", ("main",), "test"),
    ),
    Benchmark(
        name="math",
        title="MATH",
        domain="math",
        metric="exact_match",
        shots=4,
        task="math.yaml",
        judge=answers.math,
        files=("math/test",),
        source=("EleutherAI/hendrycks_math", _SUBJECTS, "test"),
    ),
    Benchmark(
        name="mbpp",
        title="MBPP",
        domain="code",
        metric="pass@1",
        shots=0,
        task="mbpp/mbpp.yaml",
        judge=answers.mbpp,
        files=("mbpp/test", "mbpp/mbpp"),
        source=("google-research-datasets/mbpp", ("full",), "test"),
        runs_code=True,
    ),
    Benchmark(
        name="humaneval",
        title="HumanEval",
        domain="code",
        metric="pass@1",
        shots=0,
        task="humaneval/humaneval.yaml",
        judge=answers.humaneval,
        files=("humaneval/test",),
        source=("openai/openai_humaneval", (None,), "test"),
        runs_code=True,
        continues=True,
    ),
    Benchmark(
        name="nq",
        title="Natural Questions",
        domain="knowledge",
        metric="exact_match",
        shots=5,
        task="nq_open/nq_open.yaml",
        judge=answers.question,
        files=("nq_open/validation", "nq/validation"),
        source=("google-research-datasets/nq_open", (None,), "validation"),
        examples=("nq_open/train", "nq_open/train_subset", "nq/train"),
        examples_split="train",
        overrides={"until": ["\n"], "fewshot_config": _FIRST},
    ),
    Benchmark(
        name="triviaqa",
        title="TriviaQA",
        domain="knowledge",
        metric="exact_match",
        shots=5,
        task="triviaqa/default.yaml",
        judge=answers.question,
        files=("triviaqa/validation",),
        source=("mandarjoshi/trivia_qa", ("unfiltered.nocontext",), "validation"),
        examples=("triviaqa/train", "triviaqa/train_subset"),
        examples_split="train",
        overrides={"until": ["\n"], "fewshot_config": _FIRST},
    ),
)
BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""By name, in the paper's order of domains."""


def parse_tasks(tasks: str) -> tuple[tuple[Benchmark, ...], tuple[str, ...]]:
    """Benchmarks, and names of other tasks of the harness, from names with commas between them.

    Raises InputError for a name that is there twice.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"--tasks: {name!r} is there twice: name each benchmark once")
    if not names:
        raise InputError(f"--tasks names no benchmark: known: {', '.join(BENCHMARKS)}")
    ours = tuple(BENCHMARKS[name] for name in names if name in BENCHMARKS)
    return ours, tuple(name for name in names if name not in BENCHMARKS)
