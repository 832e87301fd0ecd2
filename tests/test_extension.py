"""`moerge extend`: one more expert, or merged into the nearest; affinity against numpy's decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.errors import InputError
from moerge.tensors.subspaces import affinity, subspace_of
from tests.helpers import command
from tests.helpers.hf_models import read_config
from tests.helpers.tiny import make_models, read_values


def reference(a: np.ndarray, b: np.ndarray, rank: int) -> float:
    """The mean squared cosine of all principal angles, both sides."""
    (u, _, v), (w, _, x) = (np.linalg.svd(matrix) for matrix in (a, b))
    outputs, inputs = u[:, :rank].T @ w[:, :rank], v[:rank] @ x[:rank].T
    return float(((outputs**2).sum() + (inputs**2).sum()) / (2 * rank))


def test_affinity_is_that_of_the_leading_subspaces() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 30, 20))
    first, second = subspace_of(a, 0.25), subspace_of(b, 0.25)
    assert affinity(first, second) == pytest.approx(reference(a, b, 5), rel=1e-2)
    assert affinity(first, first) == pytest.approx(1, abs=1e-5)
    assert affinity(first, subspace_of(-3 * a, 0.25)) == pytest.approx(1, abs=1e-5)
    one, other = np.zeros((2, 8, 8))
    one[0, 0], other[1, 1] = 1, 1
    assert affinity(subspace_of(one), subspace_of(other)) == pytest.approx(0, abs=1e-9)
    assert affinity(subspace_of(np.zeros((8, 8))), first) is None


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    models = make_models(tmp_path, experts=("math", "code", "knowledge"))
    recipe: dict[str, Any] = {"experts": {n: str(models[n]) for n in ("math", "code")}, "moe": {"router": {"kind": "random"}}}
    return moerge.merge(recipe, tmp_path / "moe").folder


def test_an_arrival_is_added_or_merged_by_affinity(moe: Path, tmp_path: Path) -> None:
    added = moerge.extend(moe, tmp_path / "knowledge", tmp_path / "three")
    assert added.decision is None and read_config(tmp_path / "three")["num_local_experts"] == 3
    options: dict[str, Any] = {"decide": "affinity", "base": tmp_path / "base"}
    again = moerge.extend(moe, tmp_path / "code", tmp_path / "same", name="code2", **options)
    assert again.decision is not None and again.decision.merges and again.decision.nearest == "code"
    assert read_config(tmp_path / "same")["num_local_experts"] == 2
    before, after = read_values(moe), read_values(tmp_path / "same")
    for name, values in before.items():
        if "block_sparse_moe" in name:
            np.testing.assert_array_equal(after[name], values, err_msg=name)


def test_the_command(moe: Path, tmp_path: Path) -> None:
    result = command.moerge("extend", str(moe), str(tmp_path / "knowledge"), str(tmp_path / "out"), "--name", "facts")
    assert result.code == 0 and moerge.inspect(tmp_path / "out").experts == ("math", "code", "facts")
    with pytest.raises(InputError, match="math"):
        moerge.extend(moe, tmp_path / "math", tmp_path / "never")
    with pytest.raises(InputError, match="--base"):
        moerge.extend(moe, tmp_path / "knowledge", tmp_path / "never", decide="affinity")
    with pytest.raises(InputError, match="no native mixture"):
        moerge.extend(tmp_path / "math", tmp_path / "knowledge", tmp_path / "never")
