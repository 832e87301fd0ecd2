"""Docstrings start with a verb or a noun phrase, never with a word that opens a question or refers to something before."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import moerge

OPENINGS = re.compile(r"(What|Whether|How|Which|Where|That|Those|Whose|Whom|Who|When|As|Of|The same)\b")


def test_docstrings_start_with_a_verb_or_a_noun_phrase() -> None:
    root = Path(moerge.__file__).parent
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
                text = ast.get_docstring(node)
                if text and OPENINGS.match(text):
                    found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}")
    assert found == []
