"""The project's own files agree with each other: versions, Pythons, packages, commands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import moerge

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def steps(workflow: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(workflow.read_text())["jobs"].values() for step in job["steps"]]


def test_pre_commit_lints_with_the_pinned_ruff() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = [repo["rev"] for repo in hooks if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={ruff.removeprefix('v')}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_pythons_that_are_claimed_are_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    claimed = {text.removeprefix(prefix) for text in PROJECT["classifiers"] if text.startswith(prefix)}
    tested = set(re.findall(r'"3\.(\d+)"', (ROOT / ".github" / "workflows" / "test.yml").read_text()))
    assert claimed == tested
    assert PROJECT["requires-python"] == f">=3.{min(map(int, claimed))}"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_commands_that_exist(workflow: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    assert commands
    for command in commands:
        assert all(target in targets for target in re.findall(r"^make (\w+)", command)), command
        assert all((ROOT / script).is_file() for script in re.findall(r"^bash (\S+)", command)), command


def test_ci_runs_the_readme_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()
    assert "$ make test" in (ROOT / "README.md").read_text()


def test_the_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["repository-code"]) == (moerge.__version__, PROJECT["urls"]["Source"])


def test_every_package_is_on_the_map_of_the_code() -> None:
    text = (ROOT / "docs" / "where-code-lives.md").read_text()
    packages = {path.parent.name for path in (ROOT / "src" / "moerge").glob("*/__init__.py")}
    assert sorted(name for name in packages if f"`{name}/`" not in text) == []
    files = re.findall(r"`([a-z_]+/[a-z_/]*\.py)`", text)
    assert len(files) > 10
    assert [name for name in files if not (ROOT / "src" / "moerge" / name).exists() and not (ROOT / name).exists()] == []
