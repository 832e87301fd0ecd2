"""A few of the cases of `fuzz.py`, the same each time; the script runs as many as there is time for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz.fuzz import KINDS, case, is_fault
from tests.fuzz.world import make_world

pytestmark = pytest.mark.slow

CASES = 6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Intact files of every kind."""
    folder = tmp_path_factory.mktemp("fuzz") / "world"
    make_world(folder)
    return folder


def test_mutated_files_end_in_results_or_in_sentences(world: Path, tmp_path: Path) -> None:
    ends = {}
    for kind in KINDS:
        for seed in range(CASES):
            what, end = case(world, tmp_path / "case", kind, seed)
            ends[f"{kind}:{seed}: {what}"] = end
    assert not {what: end for what, end in ends.items() if is_fault(end)}
    assert sum(end == "InputError" for end in ends.values()) > len(ends) / 4
    assert sum(end == "ok" for end in ends.values()) > len(ends) / 10
