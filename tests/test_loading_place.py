"""One place loads models and tokenizers through transformers: `moerge.runtime.loading`."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

import moerge

pytestmark = pytest.mark.slow

ROOT = Path(moerge.__file__).parent

ALLOWED = {
    "runtime/loading.py": "the place",
    "architecture/needed.py": "compares a checkpoint with its class on the meta device; no model comes of it",
    "checkpoint/gguf_file.py": "config and tokenizer of a GGUF file, which become a folder; no model comes of it",
}


def test_models_are_loaded_in_one_place() -> None:
    calls: Counter[str] = Counter()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            calls[path.relative_to(ROOT).as_posix()] += isinstance(node, ast.Attribute) and node.attr == "from_pretrained"
    assert {name for name, count in calls.items() if count} == ALLOWED.keys()
