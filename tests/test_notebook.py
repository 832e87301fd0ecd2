"""The notebook in examples/, cell by cell, on tiny models."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.helpers.tiny import make_models

pytest.importorskip("torch")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow

NOTEBOOK = Path(__file__).parents[1] / "examples" / "merge_your_first_moe.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_models(tmp_path / "models", experts=("math", "code"), config={"max_position_embeddings": 512})
    (tmp_path / "texts").mkdir()
    draw = Random(0)
    for name in ("math", "code"):
        lines = [json.dumps({"text": " ".join(f"w{draw.randrange(40)}" for _ in range(100))}) for _ in range(6)]
        (tmp_path / "texts" / f"{name}.jsonl").write_text("\n".join(lines))
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    shown: dict[str, Any] = {}
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            shown[cell["id"]] = run("".join(cell["source"]), names)
    assert [kind for kind in (type(value).__name__ for value in shown.values()) if kind != "NoneType"] == [
        "Plan", "Figure", "MergeResult", "MergeResult", "Figure",
    ]  # fmt: skip
    assert {row.checkpoint for row in names["scores"].scores} == {"merged", "routed"} and names["answer"].routing
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in cells)


def run(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell; the value of its last line, which a notebook shows."""
    *lines, last = ast.parse(source).body
    if not isinstance(last, ast.Expr):
        lines, value = [*lines, last], None
    exec(compile(ast.Module(lines, []), "cell", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return value
