"""The floors of the package: imports point down, and no two files or packages import each other in a circle."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import moerge
from tests.helpers.tiny import make_models, write_recipe

ROOT = Path(moerge.__file__).parent

FLOORS = """
cli
reporting
demonstration hub exporting doctor searching
learning tuning reduction evaluation extension extraction inspection comparison inference gather renewal
merging
clients
planning
recipe
routers projectors
execution
operations
methods
statistics
runtime
figures texts
tokenizer
checkpoint
architecture
modeling
tensors
distillation results
progress
files registry quiet formatting extras
errors system
"""
"""From top to bottom. Packages of one floor do not import each other."""

FLOOR = {name: number for number, line in enumerate(reversed(FLOORS.split("\n"))) for name in line.split()}


def imported() -> Iterator[tuple[str, str]]:
    """(file, imported file) of all imports, late and type-checking ones included, as dotted names below moerge."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in ROOT.rglob("*.py")
    }
    for name, path in files.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                package = ".".join(
                    ["moerge", *name.split(".")][: None if path.name == "__init__.py" else -1][: 1 - node.level or None]
                )
                module = ".".join(filter(None, (package if node.level else "", node.module)))
                targets = [f"{module}.{alias.name}" for alias in node.names]
            for target in targets:
                if target.startswith("moerge."):
                    inside = target.removeprefix("moerge.")
                    while inside and inside not in files:
                        inside = inside.rpartition(".")[0]
                    if inside and inside != name:
                        yield name, inside


IMPORTS = sorted(set(imported()))


def test_every_package_has_a_floor() -> None:
    names = {name.split(".")[0] for pair in IMPORTS for name in pair} - {"__init__", "__main__", "plugins"}
    assert names <= FLOOR.keys()


def test_imports_point_down() -> None:
    public = {"__init__", "__main__", "plugins"}
    up = [
        f"{importer} imports {target}"
        for importer, target in IMPORTS
        if importer not in public and (a := importer.split(".")[0]) != (b := target.split(".")[0]) and FLOOR[b] >= FLOOR[a]
    ]
    assert up == []


def test_no_files_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, target in IMPORTS:
        graph.setdefault(importer, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_the_core_needs_no_extra() -> None:
    extras = ("torch", "transformers", "tokenizers", "safetensors", "jinja2", "matplotlib")
    core = ("cli.app", "merging.pipeline", "inspection", "comparison", "extraction", "renewal", "hub", "doctor")
    code = f"import sys; sys.modules |= dict.fromkeys({extras}); import " + ", ".join(f"moerge.{name}" for name in core)
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_starts_without_a_compiler(tmp_path: Path) -> None:
    """Numba takes longer to import than all else together: what runs no kernel does without."""
    make_models(tmp_path)
    recipe = str(write_recipe(tmp_path, merge={"method": "ties"}))
    code = f"import sys, moerge; moerge.plan({recipe!r}); print([name for name in ('numba', 'torch') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
