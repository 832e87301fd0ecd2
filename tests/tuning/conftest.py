"""Mixtures to tune, new for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tuning.tune_models import make_moe


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and `moe`, a Mixtral of base, math, code and knowledge."""
    found = tmp_path_factory.mktemp("native")
    make_moe(found)
    return found


@pytest.fixture(scope="module")
def by_sequence(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, and `moe`, which routes by sequence with full experts."""
    found = tmp_path_factory.mktemp("by_sequence")
    make_moe(found, by_sequence=True)
    return found
