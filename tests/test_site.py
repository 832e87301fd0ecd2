"""The documentation site builds without a warning, with every page, formula and public name on it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moerge

ROOT = Path(__file__).parents[1]

for tool in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
    pytest.importorskip(tool, reason=f"the site needs {tool}: pip install 'moerge[docs]'", exc_type=ImportError)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


def test_every_page_can_be_searched(site: Path) -> None:
    pages = {
        entry["location"].partition("#")[0] for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]
    }
    sources = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}
    assert pages == {"" if source == "index" else f"{source}/" for source in sources}


def test_the_reference_has_every_public_name(site: Path) -> None:
    page = (site / "reference" / "api" / "index.html").read_text()
    names = [name for name in moerge.__all__ if not name.startswith("_")]
    assert [name for name in names if f'id="moerge.{name}"' not in page] == []


def test_formulas_fences_and_links_are_rewritten(site: Path) -> None:
    pages = {path: path.read_text() for path in site.rglob("*.html")}
    assert sum(page.count("<math ") for page in pages.values()) > 20
    assert [path for path, page in pages.items() if re.search(r"language-math|<code>\w+ file=|\$<code>|<p>```", page)] == []
    assert "https://github.com/moerge/moerge/blob/main/CONTRIBUTING.md" in pages[site / "index.html"]


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pattern = r"<(?:script|img|link)\b[^>]*(?:src|href)=\"https?:[^\"]*\""
    assert [
        match for path in site.rglob("*.html") for match in re.findall(pattern, path.read_text()) if "canonical" not in match
    ] == []
