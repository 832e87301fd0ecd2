"""The whole command on a budget, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from moerge import load_recipe
from moerge.demonstration import DemoResult
from moerge.demonstration import demo as run
from moerge.demonstration.recipes import NAMES, recipe
from moerge.errors import InputError, MachineError
from tests.helpers.command import moerge, start

pytestmark = pytest.mark.slow

EXPERTS = ("math", "code", "knowledge")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[DemoResult, str]:
    told = StringIO()
    out = tmp_path_factory.mktemp("demo") / "out"
    return run(out, scale=0.02, console=Console(file=told, width=80)), told.getvalue()


def test_all_models_are_evaluated_on_all_domains(demo: tuple[DemoResult, str]) -> None:
    result, told = demo
    assert [row.kind for row in result.models] == ["base"] + ["expert"] * 3 + ["dense"] * 3 + ["moe"] * 3
    for row in result.models:
        assert list(row.perplexity) == ["general", "math", "code", "knowledge", "mean"]
        assert all(1 < value < 10_000 for value in row.perplexity.values())
        assert (result.out / row.model / "config.json").exists()
        assert row.model in told
        assert f"{row.perplexity['mean']:.2f}" in told
    table = told[told.index("Held-out perplexity") : told.index("Everything is in")]
    assert "…" not in table and max(map(len, table.splitlines())) <= 80


def test_merges_are_the_users_commands(demo: tuple[DemoResult, str], tmp_path: Path) -> None:
    result, told = demo
    name = "dare-moe"
    command = f"moerge merge {result.out}/recipes/{name}.yaml {result.out}/merged/{name}"
    assert command in told.replace("\n", "")
    again = moerge("merge", result.out / "recipes" / f"{name}.yaml", tmp_path / "again", "--quiet")
    assert again.code == 0, again.err
    weights = [folder / "model.safetensors" for folder in (result.out / "merged" / name, tmp_path / "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_the_results_are_left_as_json_and_markdown(demo: tuple[DemoResult, str]) -> None:
    result, _ = demo
    assert json.loads((result.out / "results.json").read_text()) == result.to_json()
    table = (result.out / "results.md").read_text()
    assert table.count("*") - table.count("**") * 2 >= 5
    assert len([line for line in table.splitlines() if line.startswith("| m")]) == 11


def test_force_replaces_the_demo_and_nothing_else(demo: tuple[DemoResult, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(demo[0].out, out)
    with pytest.raises(InputError, match="already holds a demo"):
        run(out)
    (out / "notes.txt").write_text("mine")
    from moerge.demonstration.flow import _clear

    _clear(out)
    assert sorted(path.name for path in out.iterdir()) == [".moerge-demo", "notes.txt"]


def test_a_folder_of_someone_else_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    failed = moerge("demo", "--out", tmp_path, "--force")
    assert (failed.code, failed.out) == (2, "")
    assert "not from a demo" in failed.err and len(failed.err.splitlines()) == 1
    assert (tmp_path / "models").exists()


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "file", force=True)


def test_a_folder_that_cannot_be_made_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="cannot be written"):
        run(tmp_path / "file" / "out")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch: pip install 'moerge\[models\]'"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    process = start("demo", "--out", tmp_path / "out")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "out" / ".moerge-demo").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err.endswith("moerge: interrupted\n") and "Traceback" not in err + out


@pytest.mark.parametrize("name", NAMES)
def test_recipes_are_valid(name: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe(name, EXPERTS, seed=7))
    loaded = load_recipe(file)
    assert list(loaded.experts) == list(EXPERTS)
    assert loaded.method.name == name.split("-")[0]
    assert (loaded.moe is not None) == name.endswith("moe")
