"""Against published implementations: every case of theirs is compared, or is listed with the reason why it is not ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from tests.helpers import reference
from tests.methods import oracles_elementwise, oracles_sparse, oracles_spectral, oracles_statistics
from tests.methods.oracle import Oracle
from tests.methods.oracles_statistics import StatisticsOracle

TABLES = (oracles_elementwise, oracles_sparse, oracles_spectral, oracles_statistics)
FILES = sorted({file for table in TABLES for file in (*table.COMPARED, *table.NOT_OURS)})
ELSEWHERE = {"moe_forward"}
"""Compared in `tests/routers/test_oracle_forward.py`; its other cases put a router in place of single projections."""


def together(name: str) -> dict[str, dict[str, Any]]:
    """The tables' entries by file and case; none is in two tables."""
    joined: dict[str, dict[str, Any]] = {file: {} for file in FILES}
    for table in TABLES:
        entries: Mapping[str, Mapping[str, Any]] = getattr(table, name)
        for file, cases in entries.items():
            assert not joined[file].keys() & cases.keys()
            joined[file] |= cases
    return joined


COMPARED, NOT_OURS = together("COMPARED"), together("NOT_OURS")


@pytest.fixture(scope="module")
def loaded(oracles: Path) -> Callable[[str], Any]:
    kinds = dict.fromkeys(FILES, Oracle) | dict.fromkeys(oracles_statistics.COMPARED, StatisticsOracle)
    known = {name: kind(name, oracles) for name, kind in kinds.items()}
    return known.__getitem__


@pytest.mark.parametrize(("file", "case_id"), [(file, case_id) for file in FILES for case_id in COMPARED[file]])
def test_it_equals_the_published_implementation(file: str, case_id: str, loaded: Callable[[str], Any]) -> None:
    COMPARED[file][case_id](loaded(file), case_id)


@pytest.mark.parametrize(("file", "case_id"), [(file, case_id) for file in FILES for case_id in NOT_OURS[file]])
def test_what_is_not_ours_really_differs(file: str, case_id: str, loaded: Callable[[str], Any]) -> None:
    oracle, (_, nearest) = loaded(file), NOT_OURS[file][case_id]
    if nearest is None:
        assert oracle.cases[case_id]["kind"] == "error"
    else:
        assert oracle.difference(case_id, nearest(oracle, case_id)) > 50 * (oracle.cases[case_id]["atol"] or 1e-6)


@pytest.mark.parametrize("file", FILES)
def test_no_case_is_forgotten(file: str, loaded: Callable[[str], Any]) -> None:
    assert not COMPARED[file].keys() & NOT_OURS[file].keys()
    assert COMPARED[file].keys() | NOT_OURS[file].keys() == loaded(file).cases.keys()


def test_no_file_is_forgotten(oracles: Path) -> None:
    assert {path.stem for path in oracles.glob("*.json")} == {*FILES, *ELSEWHERE}


EDGES = ["near", "same", "opposite", "almost_opposite", "orthogonal", "zero"]


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("edge", EDGES)
def test_slerp_of_their_edge_inputs_is_the_formula(edge: str, t: float, loaded: Callable[[str], Any]) -> None:
    """They publish inputs only: parallel, opposite, orthogonal and zero vectors."""
    arrays = loaded("slerp_stock").arrays
    first_N, second_N = arrays[f"in/edge_{edge}_a"], arrays[f"in/edge_{edge}_b"]
    merged = moerge.merge_state_dicts(None, [{"w": first_N}, {"w": second_N}], method="slerp", t=t)["w"]
    expected_N = reference.slerp(first_N.astype(np.float64), second_N.astype(np.float64), t)
    np.testing.assert_allclose(merged, expected_N, rtol=1e-6, atol=1e-6)


def test_every_edge_input_of_slerp_is_used(loaded: Callable[[str], Any]) -> None:
    arrays = loaded("slerp_stock").arrays
    found = {name.removeprefix("in/edge_")[:-2] for name in arrays if name.startswith("in/edge_")}
    assert found == set(EDGES)


@pytest.mark.parametrize("batch", [1, 4])
def test_only_the_statistic_of_mergelm_differs_not_the_merge(batch: int, loaded: Callable[[str], Any]) -> None:
    oracle = loaded("fisher_torch")
    examples = [oracle.arrays[f"in/x{k}"] for k in range(2)]
    oracle.check(f"mergelm_end2end_batch{batch}", oracles_statistics.gathered_mlp(oracle, examples, batch, exact=False))


def test_too_little_text_does_not_blow_up(loaded: Callable[[str], Any]) -> None:
    oracle = loaded("regmean")
    merged = oracles_statistics.regmean_of(oracle, "gramfew", alpha=1)
    largest = max(float(np.abs(network["0.weight"]).max()) for network in oracle.models("net"))
    assert float(np.abs(oracle.model("fb_few_a1.0")["0.weight"]).max()) > 20 * largest
    assert float(np.abs(merged["0.weight"]).max()) < largest
