"""The text that comes with every Python: documentation for prose, the standard library's source for code."""

from __future__ import annotations

import ast
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from moerge.errors import MachineError

# Tests and generated tables (encodings) repeat themselves from file to file; the rest is not part of the library.
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "lib2to3", "pydoc_data",
            "turtledemo", "ensurepip", "__pycache__"}  # fmt: skip
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_CUT = 6_000
"""Characters kept of one module's prose and of its code, so that no single module dominates a corpus."""


def topics() -> list[str]:
    """The chapters of the language reference that `help()` shows."""
    from pydoc_data.topics import topics as chapters

    return [chapters[name] for name in sorted(chapters)]


@dataclass(frozen=True)
class Module:
    """One module in two parts that have nothing in common."""

    prose: str
    """Its docstrings."""
    code: str
    """Its source without docstrings and comments."""


def modules(rng: Random) -> Iterator[Module]:
    """The modules of the standard library in random order.

    Raises MachineError where Python was installed without the source of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = list(_sources(root))
    if len(files) < 100:
        raise MachineError(f"this Python has no source of its standard library in {root}, which the demo trains on")
    rng.shuffle(files)
    for file in files:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", category=SyntaxWarning)
                warnings.simplefilter("ignore", category=DeprecationWarning)
                tree = ast.parse(file.read_bytes())
        except (SyntaxError, OSError):
            continue
        docstrings = _take_docstrings(tree)
        yield Module(prose="\n\n".join(docstrings)[:_CUT], code=ast.unparse(tree)[:_CUT])


def _sources(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def _take_docstrings(tree: ast.Module) -> list[str]:
    """Remove the docstrings from `tree` and return them."""
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node)) is not None:
            docstrings.append(docstring)
            node.body = node.body[1:] or [ast.Pass()]
    return docstrings
