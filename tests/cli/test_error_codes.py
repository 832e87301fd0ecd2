"""Codes of errors: what a program reads after `--json`, and in Python."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from moerge.errors import InputError, Interrupted, MachineError, SourceChangedError
from tests.helpers.command import moerge
from tests.helpers.tiny import edit_config, make_models, write_recipe


def target_exists(folder: Path) -> None:
    (folder / "out").mkdir()


def models_differ(folder: Path) -> None:
    edit_config(folder / "math", hidden_size=24)


def quantised(folder: Path) -> None:
    edit_config(folder / "math", quantization_config={"quant_method": "gptq"})


def truncated(folder: Path) -> None:
    weights = folder / "math" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def no_json(folder: Path) -> None:
    (folder / "math" / "config.json").write_text("{")


def no_model(folder: Path) -> None:
    shutil.rmtree(folder / "math")


def unknown_model(folder: Path) -> None:
    write_recipe(folder, tokenizer="maths")


def unknown_expert(folder: Path) -> None:
    overrides = [{"match": "embedding", "method": "linear", "weights": {"maths": 2.0}}]
    write_recipe(folder, merge={"method": "average", "overrides": overrides})


def unknown_key(folder: Path) -> None:
    write_recipe(folder, merge={"method": "ties", "densty": 0.5})


def unknown_method(folder: Path) -> None:
    write_recipe(folder, merge={"method": "tis"})


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "code", "options"),
    [
        (target_exists, "target-exists", ()),
        (models_differ, "models-differ", ()),
        (quantised, "quantised-model", ()),
        (truncated, "damaged-file", ()),
        (no_json, "damaged-file", ()),
        (no_model, "not-found", ()),
        (unknown_key, "unknown-name", ()),
        (unknown_method, "unknown-name", ()),
        (unknown_model, "unknown-name", ()),
        (unknown_expert, "unknown-name", ()),
        (nothing, "unknown-name", ("--for", "llama.ccp")),
        (nothing, "client-cannot-run", ("--for", "llama.cpp")),
        (nothing, "usage", ("--nope",)),
        (nothing, "usage", ("--threads", "x")),
        (nothing, "input", ("--max-shard-size", "5 apples")),
    ],
)
def test_a_refusal_has_a_code(tmp_path: Path, spoil: Callable[[Path], None], code: str, options: tuple[str, ...]) -> None:
    make_models(tmp_path)
    write_recipe(tmp_path)
    spoil(tmp_path)
    arguments = ("merge", tmp_path / "recipe.yaml", tmp_path / "out", *options)
    plain, result = moerge(*arguments), moerge(*arguments, "--json")
    assert (plain.code, plain.out) == (2, "")
    assert result.json["error"] == {"code": code, "message": plain.err.removeprefix("moerge: ").rstrip("\n"), "exit_code": 2}
    assert (result.code, result.err) == (2, plain.err)


def test_a_full_disk_is_the_machines_fault(tmp_path: Path) -> None:
    make_models(tmp_path)
    merge = ("merge", write_recipe(tmp_path), tmp_path / "out", "--json")
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=0)):
        full = moerge(*merge)
    assert (full.code, full.json["error"]["code"], full.json["error"]["exit_code"]) == (1, "no-space", 1)


def test_after_two_dashes_json_is_no_option(tmp_path: Path) -> None:
    result = moerge("plan", tmp_path / "recipe.yaml", "--", "--json")
    assert (result.code, result.out) == (2, "")


def test_interruption_has_a_code(tmp_path: Path) -> None:
    with mock.patch("moerge.cli.app", side_effect=KeyboardInterrupt):
        result = moerge("plan", tmp_path, "--json")
    assert (result.code, result.json["error"]["code"]) == (130, "interrupted")


@pytest.mark.parametrize(
    ("kind", "code"),
    [(InputError, "input"), (MachineError, "machine"), (SourceChangedError, "source-changed"), (Interrupted, "interrupted")],
)
def test_every_kind_of_error_has_a_code_that_can_be_pickled(kind: type[InputError], code: str) -> None:
    assert kind("said").code == code
    again = pickle.loads(pickle.dumps(kind("said", code="busy")))
    assert (again.code, str(again)) == ("busy", "said")
