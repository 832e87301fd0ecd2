"""Models of several families, new for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.whole_models import make_mixed


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of MIXED."""
    folder = tmp_path_factory.mktemp("mixed")
    make_mixed(folder)
    return folder
