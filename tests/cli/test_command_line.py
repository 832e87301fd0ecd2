"""Calling moerge: usage errors, exit codes, JSON, and what it must not import."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.command import moerge, start
from tests.helpers.tiny import make_models, write_recipe

HEAVY = ("numpy", "numba", "torch", "transformers", "pydantic", "huggingface_hub", "safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_models(folder)
    write_recipe(folder)
    return folder


@pytest.mark.parametrize("code", ["import moerge", "import sys; sys.argv[1:] = ['--help']; from moerge.cli import main; main()"])
def test_help_and_import_load_nothing_heavy(code: str) -> None:
    script = f"import atexit, sys\natexit.register(lambda: print('LOADED', [n for n in {HEAVY} if n in sys.modules]))\n{code}"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("LOADED []\n"), result.stdout[-200:]


def test_a_merge_loads_neither_torch_nor_transformers(models: Path, tmp_path: Path) -> None:
    script = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('LOADED', [n for n in ('torch', 'transformers', 'safetensors') if n in sys.modules]))\n"
        f"sys.argv[1:] = ['merge', {str(models / 'recipe.yaml')!r}, {str(tmp_path / 'out')!r}, '--quiet']\n"
        "from moerge.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("LOADED []\n", "")


def test_help_names_every_command() -> None:
    result = moerge("--help")
    assert (result.code, result.err) == (0, "")
    for command in ("plan", "merge", "verify", "inspect", "generate", "route", "demo"):
        assert command in result.out
        described = moerge(command, "--help")
        assert (described.code, "Usage" in described.out) == (0, True)


@pytest.mark.parametrize(("typed", "completed"), [("moerge me", "merge"), ("moerge plan --as", "--as-recipe")])
def test_the_shell_completes_commands_and_options(typed: str, completed: str) -> None:
    environment = {
        **os.environ,
        "_MOERGE_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(len(typed.split()) - 1),
    }
    script = "import sys; sys.argv[:] = ['moerge']; from moerge.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert completed in result.stdout.split()


def test_version() -> None:
    from importlib.metadata import version

    assert moerge("--version").out == f"moerge {version('moerge')}\n"


def test_no_command_shows_the_help() -> None:
    result = moerge()
    assert (result.code, result.err, "Usage" in result.out) == (2, "", True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plann"], "No such command 'plann'. Did you mean 'plan', 'learn'? (see: moerge --help)"),
        (["merge"], "Missing argument 'RECIPE'. (see: moerge merge --help)"),
        (["merge", "{r}"], "Missing argument 'OUT'. (see: moerge merge --help)"),
        (["plan", "{r}", "--sed", "1"], "No such option: --sed"),
        (["plan", "{r}", "--seed", "x"], "Invalid value for '--seed'"),
        (["merge", "{r}", "{o}", "--threads", "0"], "Invalid value for '--threads'"),
        (["merge", "{r}", "{o}", "--max-shard-size", "0"], "'0' is not a size: write a number and a unit, such as 500MB or 5GB"),
        (["merge", "{r}", "{o}", "--max-shard-size", "1" * 400], "is not a size"),
        (["merge", "{r}", "{o}", "--threads", "1000000"], "--threads': Input should be less than or equal to 1024"),
        (["merge", "{r}", "{o}", "--max-shard-size", "5 apples"], "'5 apples' is not a size"),
        (["merge", "{r}", "{o}", "--max-shard-size", "-1GB"], "'-1GB' is not a size"),
        (["merge", "{r}", "{o}", "extra"], "Got unexpected extra argument"),
    ],
)
def test_a_wrong_call(models: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"r": models / "recipe.yaml", "o": tmp_path / "out"}
    result = moerge(*(argument.format(**places) for argument in arguments))
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1), result
    assert result.err.startswith("moerge: ") and message in result.err, result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "shards"), [("3000", 5), ("3 kB", 5), ("2.9297KiB", 5), ("0.003MB", 5), ("1e3", None), ("1GB", 1)]
)
def test_sizes(models: Path, tmp_path: Path, text: str, shards: int | None) -> None:
    result = moerge("merge", models / "recipe.yaml", tmp_path / "out", "--max-shard-size", text)
    assert result.code == (0 if shards else 2)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == (shards or 0)


def test_a_merge_reports_as_json(models: Path, tmp_path: Path) -> None:
    result = moerge("merge", models / "recipe.yaml", tmp_path / "out", "--json", "--threads", 2)
    assert (result.code, result.err) == (0, "")
    found = result.json
    assert found["checkpoint"] == str(tmp_path / "out")
    assert (found["threads"], found["tensors"], found["nonfinite_inputs"]) == (2, 21, [])
    assert found["operations"] == {"average": 21}
    assert found["merge_seconds"] >= 0 and found["publish_seconds"] >= 0


def test_what_a_person_sees_after_a_merge(models: Path, tmp_path: Path) -> None:
    result = moerge("merge", models / "recipe.yaml", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    for part in (str(tmp_path / "out"), "5.97k parameters", "11.9 kB", "merged in"):
        assert part in result.out.replace("\n", ""), part
    assert moerge("merge", models / "recipe.yaml", tmp_path / "again", "--quiet").out == ""


def test_a_relative_target_and_a_trailing_slash(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert moerge("merge", models / "recipe.yaml", "deep/out/").code == 0
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_python_dash_m_and_a_closed_pipe(models: Path) -> None:
    process = start("plan", models / "recipe.yaml", "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err, json.loads(out)["tensors"]) == (0, "", 21)
    script = f"{sys.executable} -m moerge plan {models / 'recipe.yaml'} --json | true"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert "Traceback" not in result.stderr


def test_progress_appears_only_on_long_work(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from moerge import progress

    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.0)
    with progress.TerminalProgress() as shown:
        advance = shown.phase("merging", 282_000)
        advance(141_000)
        time.sleep(0.3)
    assert re.match(r"merging: (0 B|141 kB) of 282 kB, [\d.]+ \w+/s, ", capfd.readouterr().err)
    monkeypatch.setattr(progress, "_PATIENCE_SECONDS", 0.2)
    with progress.TerminalProgress() as texts:
        texts.phase("calibrating", 40, "texts")(10)
        time.sleep(0.5)
    assert re.fullmatch(r"calibrating: 10 of 40 texts, [\d,.]+/s, \d+ s left\n", capfd.readouterr().err)
    with progress.TerminalProgress() as texts:
        texts.phase("calibrating", 40, "texts")
    assert capfd.readouterr().err == ""
    with progress.TerminalProgress(quiet=True) as silent:
        silent.phase("merging", 10)(10)
        time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_a_console_that_lacks_letters(models: Path) -> None:
    renamed = models.parent / "modèle"
    shutil.copytree(models / "base", renamed)
    process = start("inspect", renamed, env={"PYTHONIOENCODING": "ascii", "COLUMNS": "200"})
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "") and "mod\\xe8le" in out
