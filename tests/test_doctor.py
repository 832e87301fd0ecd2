"""`moerge doctor` tells what is installed, what is missing, and where caches are."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import moerge
from moerge import doctor
from moerge.cli.app import app
from moerge.evaluation import sandbox


def run(*options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["doctor", *options], env={"COLUMNS": "300"})
    return result.exit_code, result.stdout


def test_versions_are_those_of_the_installed_packages() -> None:
    code, output = run("--json")
    facts = json.loads(output)
    assert (code, facts["healthy"], facts["moerge"]) == (0, True, moerge.__version__)
    core = {package["name"]: package["installed"] for package in facts["core"]}
    assert core["numpy"] == version("numpy")
    assert "torch" not in core
    assert {"models", "figures", "report", "tune", "eval"} <= set(facts["extras"])
    assert not {"dev", "docs"} & set(facts["extras"])
    assert facts["sandbox"] == sandbox.wall()
    assert {"peft", "torch"} <= {package["name"] for package in facts["extras"]["tune"]["packages"]}


def test_missing_and_old_packages_name_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": None, "safetensors": "0.1"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: installed.get(name, real(name)))
    code, output = run("--json")
    models = json.loads(output)["extras"]["models"]
    assert (code, models["complete"], models["install"]) == (0, False, "pip install 'moerge[models]'")
    assert [package.partition(">")[0] for package in models["missing"]] == ["safetensors", "torch"]
    row = next(line for line in run()[1].splitlines() if line.startswith("extra models"))
    assert "pip install 'moerge[models]'" in row
    assert "(0.1 is installed)" in row


def test_a_core_package_of_a_version_out_of_range_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.1" if name == "numpy" else real(name))
    code, output = run("--json")
    assert (code, json.loads(output)["healthy"]) == (1, False)


def test_caches_follow_the_environment(tmp_path: Path) -> None:
    places = {"HF_HOME": str(tmp_path / "hub"), "NUMBA_CACHE_DIR": str(tmp_path / "kernels")}
    command = [sys.executable, "-m", "moerge", "doctor", "--json"]
    output = subprocess.run(command, env={"PATH": "/usr/bin:/bin", **places}, capture_output=True, text=True, check=True)
    caches = json.loads(output.stdout)["caches"]
    assert Path(caches["hub"]["path"]).is_relative_to(tmp_path / "hub")
    assert Path(caches["kernels"]["path"]).is_relative_to(tmp_path / "kernels")
    assert caches["hub"]["writable"]


def test_without_torch_merging_is_healthy(tmp_path: Path) -> None:
    """The whole command, where importing torch fails."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['moerge', 'doctor', '--json']; from moerge.cli import main; main()"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(output.stdout)["healthy"]


def test_torch_is_asked_only_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(doctor, "_GPU_DEVICES", ())
    assert doctor._gpus() == ((), "the system shows no GPU")
    monkeypatch.setattr(doctor, "_GPU_DEVICES", ("null",))
    assert doctor._gpus() == ((), "torch is not installed, so none can be used")


def test_a_system_without_limits_has_no_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert json.loads(run("--json")[1])["sandbox"] == "none"
