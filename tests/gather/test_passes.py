"""Dividing sums into passes, by number and by memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.gather.passes import free_memory, passes_within

pytestmark = pytest.mark.slow

SIZES = {"fisher:a": 10, "gram:a": 30, "gram:b": 50, "fisher:b": 20, "gram:c": 40}


def test_kinds_run_apart_and_gram_matrices_first() -> None:
    assert passes_within(SIZES, None, 1000) == [["gram:a", "gram:b", "gram:c"], ["fisher:a", "fisher:b"]]
    assert passes_within({"gram:a": 1}, None, 10) == [["gram:a"]]
    assert passes_within({}, None, 10) == []


def test_four_fifths_of_the_free_memory_are_filled() -> None:
    assert passes_within(SIZES, None, 100) == [["gram:a", "gram:b"], ["gram:c"], ["fisher:a", "fisher:b"]]
    assert passes_within(SIZES, None, 99) == [["gram:a"], ["gram:b"], ["gram:c"], ["fisher:a", "fisher:b"]]


def test_what_does_not_fit_has_a_pass_of_its_own() -> None:
    assert passes_within(SIZES, None, 1) == [["gram:a"], ["gram:b"], ["gram:c"], ["fisher:a"], ["fisher:b"]]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 50))
def test_a_number_of_passes(sizes: list[int], passes: int) -> None:
    named = {f"gram:{i}": size for i, size in enumerate(sizes)}
    groups = passes_within(named, passes, 0)
    assert [name for group in groups for name in group] == list(named)
    assert len(groups) <= passes and all(groups)
    held = [sum(named[name] for name in group) for group in groups]
    assert max(held) <= sum(sizes) / passes + max(sizes)


def test_free_memory_is_that_of_the_machine() -> None:
    total = next(
        int(line.split()[1]) * 1024 for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal")
    )
    assert 0 < free_memory(SimpleNamespace(type="cpu")) < total
