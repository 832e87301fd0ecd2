"""The distributions: what they contain, and what an index would show of them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest

import moerge

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "moerge"

for tool in ("build", "hatchling", "hatch_fancy_pypi_readme", "twine"):
    pytest.importorskip(tool, reason=f"building needs {tool}: pip install 'moerge[dev]'")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of a copy of the project, and the wheel that is built from that sdist."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("src", "tests", "docs", "benchmarks", "experiments", ".ci"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
    run("build", "--no-isolation", "--outdir", str(folder / "dist"), str(folder))
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def run(module: str, *arguments: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments], capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"}
    )
    assert result.returncode == 0, result.stdout + result.stderr


def package_files() -> set[str]:
    return {
        str(path.relative_to(PACKAGE.parent))
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }


def test_the_sdist_has_the_package_and_what_building_needs(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    others = {".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"}
    assert names == {f"src/{name}" for name in package_files()} | others


def test_the_wheel_has_the_package_and_its_metadata(distributions: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(distributions[1]).namelist())
    info = f"moerge-{moerge.__version__}.dist-info"
    extra = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")}
    assert names == package_files() | extra
    assert "moerge/py.typed" in names


def test_an_index_would_take_and_show_them(distributions: tuple[Path, Path]) -> None:
    run("twine", "check", "--strict", *map(str, distributions))
    wheel = zipfile.ZipFile(distributions[1])
    metadata = Parser().parsestr(wheel.read(f"moerge-{moerge.__version__}.dist-info/METADATA").decode())
    text = metadata.get_payload()
    links = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert {url.partition(",")[0] for url in metadata.get_all("Project-URL")} >= {"Homepage", "Source", "Issues", "Changelog"}


def test_links_of_the_index_lead_to_files_of_the_project(distributions: tuple[Path, Path]) -> None:
    wheel = zipfile.ZipFile(distributions[1])
    text = wheel.read(f"moerge-{moerge.__version__}.dist-info/METADATA").decode()
    paths = set(re.findall(r"https://github\.com/moerge/moerge/blob/main/([^)#\s]+)", text))
    paths |= set(re.findall(r"https://raw\.githubusercontent\.com/moerge/moerge/main/([^)#\s]+)", text))
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_dev_has_all_that_users_can_install() -> None:
    from moerge.doctor import _dependencies, diagnose

    developers = {dependency.name for dependency in _dependencies("dev")}
    assert [extra.name for extra in diagnose().extras if not {each.name for each in extra.dependencies} <= developers] == []


def test_version_is_the_installed_one() -> None:
    assert moerge.__version__ == version("moerge")
