"""Scripts that no test runs import names of moerge that exist."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("benchmarks", "experiments", "examples", "tests/clients", "tests/matrix", "tests/fuzz")
SCRIPTS = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_scripts_import_is_there(script: Path) -> None:
    pytest.importorskip("torch", reason="needs moerge[models]")
    imports = (node for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom))
    ours = [node for node in imports if node.module and node.module.split(".")[0] == "moerge"]
    names = [(node.module or "", alias.name) for node in ours for alias in node.names]
    missing = [pair for pair in names if not hasattr(import_module(pair[0]), pair[1]) and find_spec(".".join(pair)) is None]
    assert missing == []
