"""The folder that the report's tests share; a test that changes it takes a copy."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reporting.browser import Browser, executable
from tests.reporting.results import make_results

pytest.importorskip("jinja2", reason="needs moerge[report]")


@pytest.fixture(scope="session")
def shared_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything."""
    return make_results(tmp_path_factory.mktemp("results") / "experiment")


@pytest.fixture
def results(shared_results: Path, tmp_path: Path) -> Path:
    """A copy of one of everything."""
    return Path(shutil.copytree(shared_results, tmp_path / "experiment"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium; without one the test is skipped."""
    if executable() is None:
        pytest.skip("there is no Chromium on this machine (install chromium, or set MOERGE_CHROMIUM)")
    with Browser() as running:
        yield running
