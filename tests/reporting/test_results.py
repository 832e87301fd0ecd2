"""Each file of results: its keys and their order, and reading what was written by this and by other versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moerge.checkpoint.manifest import to_json
from moerge.comparison.result import Comparison
from moerge.demonstration.result import DemoResult
from moerge.evaluation.result import Evaluation
from moerge.inference.result import Routes
from moerge.results import Result
from tests.reporting.results import demo, evaluation, sequence_routes, token_routes

KEYS = {
    Routes: "checkpoint digest level experts texts accuracy oracle_accuracy load balance warnings",
    Comparison: "recipe models experts compared densities separate unheeded advice verdicts pairs rows warnings",
    Evaluation: "format checkpoints digests settings versions measures differences warnings",
    DemoResult: "out seed models seconds",
}
OPTIONAL = {Routes: "digest oracle_accuracy warnings", Comparison: "densities separate unheeded warnings", Evaluation: "digests"}


@pytest.fixture(scope="module")
def everything(shared_results: Path) -> list[Result]:
    compared = Comparison.model_validate_json((shared_results / "compare" / "compare.json").read_bytes())
    return [token_routes("digest"), sequence_routes(), compared, evaluation(shared_results), demo()]


def test_keys_are_in_order(everything: list[Result]) -> None:
    for result in everything:
        assert list(result.to_json()) == KEYS[type(result)].split()  # type: ignore[index]


def test_what_was_written_is_read(everything: list[Result]) -> None:
    for result in everything:
        assert type(result).model_validate_json(to_json(result.to_json())) == result


def test_files_of_other_versions_are_read(everything: list[Result]) -> None:
    """Unknown keys are ignored, and what older versions did not write may be absent."""
    for result in everything:
        held = {**result.to_json(), "of_a_later_version": 1}
        for key in OPTIONAL.get(type(result), "").split():  # type: ignore[call-overload]
            del held[key]
        read = type(result).model_validate_json(json.dumps(held))
        assert read.to_json().keys() == result.to_json().keys()


def replaced(value: Any, new: Any) -> Any:
    """The value with its first float replaced."""
    if isinstance(value, float):
        return new, True
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        changed, done = replaced(item, new)
        if done:
            held = dict(value) if isinstance(value, dict) else list(value)
            held[key] = changed
            return held, True
    return value, False


@pytest.mark.parametrize("number", [float("nan"), float("inf"), "many"])
def test_numbers_are_finite(everything: list[Result], number: Any) -> None:
    for result in everything:
        held, done = replaced(result.to_json(), number)
        assert done
        with pytest.raises(ValidationError):
            type(result).model_validate(held)


def test_a_result_is_one_line_and_a_table(everything: list[Result]) -> None:
    for result in everything:
        assert repr(result) == str(result) and "\n" not in repr(result)
        assert repr(result).startswith(f"<{type(result).__name__}: ")
        assert "<table>" in result._repr_html_()
