"""The questions of a benchmark, from local files or from the Hub, in one shape wherever they come from.

gsm8k                question, answer
math                 problem, solution
mbpp                 text, test_list, test_setup_code, code
humaneval            prompt, test, entry_point, canonical_solution
nq, triviaqa         question, answers (all that are accepted)
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from moerge.errors import InputError
from moerge.evaluation.answers import aliases
from moerge.evaluation.benchmarks import Benchmark
from moerge.files import open_file, unreadable
from moerge.tensors.digest import file_digest

Row = dict[str, Any]

_FIELDS: dict[str, dict[str, type]] = {
    "gsm8k": {"question": str, "answer": str},
    "math": {"problem": str, "solution": str},
    "mbpp": {"task_id": int, "text": str, "test_list": list, "test_setup_code": str, "code": str},
    "humaneval": {"prompt": str, "test": str, "entry_point": str, "canonical_solution": str},
    "nq": {"question": str},
    "triviaqa": {"question": str},
}
_MBPP_TEST = range(11, 511)
"""Task ids of the test split, in the file that holds all splits."""
_EXAMPLE_WORDS = 4
_ENDINGS = (".jsonl", ".jsonl.zst")


class Questions:
    """A benchmark's questions, and the examples for its prompt (none where the task brings them along)."""

    def __init__(self, benchmark: Benchmark, rows: list[Row], examples: list[Row], source: str) -> None:
        self.benchmark, self.rows, self.examples, self.source = benchmark, rows, examples, source

    @cached_property
    def digest(self) -> str:
        """Return a digest of everything that is asked and accepted."""
        return file_digest(json.dumps([self.rows, self.examples], sort_keys=True).encode("utf-8", "surrogatepass"))


def load_questions(benchmark: Benchmark, data: Path | None) -> Questions:
    """All questions of a benchmark: from `data`, else from the Hub. InputError where they are missing or not of their shape."""
    names = (benchmark.files, benchmark.examples)
    if data is not None:
        files = [_find(data, benchmark, wanted) if wanted else None for wanted in names]
        found = [_shaped(benchmark, _read(file), str(file)) if file else iter(()) for file in files]
        source = str(files[0])
    else:
        repository, configurations, split = benchmark.source
        splits = (split, benchmark.examples_split)
        found = [
            _shaped(benchmark, _download(repository, configurations, part), repository) if part else iter(()) for part in splits
        ]
        source = f"{repository} on the Hub, {split} split"
    questions, candidates = found
    examples = list(islice(filter(_is_example, candidates), benchmark.shots))
    if len(examples) < benchmark.shots and benchmark.examples:
        raise InputError(
            f"{benchmark.title} needs {benchmark.shots} examples with a single short answer: {source} has {len(examples)}"
        )
    rows = list(questions)
    if not rows:
        raise InputError(f"{source} holds no question of {benchmark.title}: check the file")
    return Questions(benchmark, rows, examples, source)


def _is_example(row: Row) -> bool:
    """Return whether a question shows what an answer looks like: one accepted answer, of a few words."""
    return len(row["answers"]) == 1 and len(row["answers"][0].split()) <= _EXAMPLE_WORDS


def _find(data: Path, benchmark: Benchmark, names: Iterable[str]) -> Path:
    candidates = [data / f"{name}{ending}" for name in names for ending in _ENDINGS]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise InputError(f"--data: {benchmark.title} needs the file {candidates[0]} (or {', '.join(str(c) for c in candidates[1:])})")


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}, line {number}", _parse(line, f"{path}, line {number}")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: save it as such") from None
    except OSError as error:
        raise unreadable(path, error) from None


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOBase]:
    if path.suffix != ".zst":
        with open_file(path) as file:
            yield io.TextIOWrapper(file, encoding="utf-8")
        return
    try:
        import zstandard
    except ImportError:
        raise InputError(f"reading {path} needs zstandard: pip install zstandard, or unpack it", code="missing-extra") from None
    with open_file(path) as packed, zstandard.ZstdDecompressor().stream_reader(packed) as stream:
        try:
            yield io.TextIOWrapper(stream, encoding="utf-8")
        except zstandard.ZstdError as error:
            raise InputError(f"cannot unpack {path}: {error}") from None


def _parse(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None


def _download(repository: str, configurations: Iterable[str | None], split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    for configuration in configurations:
        try:
            rows = datasets.load_dataset(repository, configuration, split=split)
        except Exception as error:  # the library documents none, and raises its own, requests', OSError and ValueError
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"cannot get {repository} from the Hub ({reason}): give local files with --data DIR") from None
        for number, row in enumerate(rows, 1):
            yield f"{repository}, {configuration or 'default'}, {split} split, row {number}", row


def _shaped(benchmark: Benchmark, rows: Iterator[tuple[str, Any]], source: str) -> Iterator[Row]:
    for where, row in rows:
        shaped = _shape(benchmark.name, row, where)
        if shaped is not None:
            yield shaped


def _shape(name: str, row: Any, where: str) -> Row | None:
    """The fields that a benchmark needs; None for a row of another split."""
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: should be an object with the fields {', '.join(_FIELDS[name])}")
    if name == "mbpp":
        row = {"test_setup_code": "", **row}
    for key, kind in _FIELDS[name].items():
        if not isinstance(row.get(key), kind):
            raise InputError(f"{where}: {name} needs the field {key!r}, of type {kind.__name__}")
    shaped = {key: row[key] for key in _FIELDS[name]}
    if name in ("nq", "triviaqa"):
        return {**shaped, "answers": _answers(row.get("answer"), where)}
    if name == "mbpp":
        number = shaped.pop("task_id")
        return shaped if number in _MBPP_TEST else None
    return shaped


def _answers(given: Any, where: str) -> list[str]:
    """All accepted answers: a list, or TriviaQA's `{"value": ..., "aliases": [...]}`."""
    if isinstance(given, Mapping):
        given = [given.get("value"), *(given.get("aliases") or ())]
    if not isinstance(given, list) or not all(isinstance(answer, str) for answer in given) or not aliases(given):
        raise InputError(f"{where}: 'answer' should be a list of accepted answers")
    return aliases(given)
