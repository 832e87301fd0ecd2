"""Folded experts of whole checkpoints against float64 formulas, and routers that are fitted to their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.reduction.run import ReduceResult
from tests.helpers.hf_models import load, logits, torch
from tests.helpers.tiny import read_tensors, read_values
from tests.reduction.mixtures import EXPERTS, make, recipe

pytestmark = pytest.mark.slow


def reduced(folder: Path, out: str = "out", **settings: Any) -> ReduceResult:
    """The mixture `model` in a folder, reduced; statistics are shared."""
    return moerge.reduce(recipe(folder, statistics="kept", protect="none", **settings), folder / out)


def matrix(tensors: dict[str, np.ndarray], layer: int, expert: int, part: str) -> np.ndarray:
    """A matrix of an expert of a Mixtral or GraniteMoe."""
    module = f"model.layers.{layer}.block_sparse_moe"
    if f"{module}.input_linear.weight" in tensors:
        gate, up = np.split(tensors[f"{module}.input_linear.weight"][expert], 2)
        return {"gate": gate, "up": up, "down": tensors[f"{module}.output_linear.weight"][expert]}[part]
    return tensors[f"{module}.experts.{expert}.{ {'gate': 'w1', 'up': 'w3', 'down': 'w2'}[part] }.weight"]


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
@pytest.mark.parametrize("groups", ["ream", "hierarchical", "kmeans"])
def test_an_average_is_weighted_by_scores_or_frequency(family: str, groups: str, tmp_path: Path) -> None:
    make(tmp_path / "model", family)
    result = reduced(tmp_path, merge="average", groups=groups)
    before, after = read_values(tmp_path / "model"), read_values(tmp_path / "out")
    folded = 0
    for choice in result.choice.layers:
        assert sorted(e for kept in choice.kept for e in choice.members(kept)) == list(range(EXPERTS))
        for slot, expert in enumerate(choice.kept):
            members, weights = choice.members(expert), choice.weights(expert)
            assert sum(weights) == pytest.approx(1)
            folded += len(members) > 1
            for part in ("gate", "up", "down"):
                expected = sum(
                    w * matrix(before, choice.layer, m, part).astype(np.float64) for w, m in zip(weights, members, strict=True)
                )
                np.testing.assert_allclose(matrix(after, choice.layer, slot, part), expected, atol=1e-6)
    assert folded


def plant_copies(folder: Path) -> None:
    """Make expert 5 of each layer expert 1 with its neurons in another order, and give it the same row."""
    whole = load(folder)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in whole.model.layers:
            experts, gate = layer.mlp.experts, layer.mlp.gate
            first, second = experts.gate_up_proj[1].chunk(2)
            experts.gate_up_proj[5] = torch.cat([first[order], second[order]])
            experts.down_proj[5] = experts.down_proj[1][:, order]
            gate.weight[5] = gate.weight[1]
    whole.save_pretrained(folder)


@pytest.mark.parametrize("groups", ["hierarchical", "kmeans"])
def test_a_permuted_copy_joins_and_folds_back_if_neurons_are_aligned(groups: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    plant_copies(tmp_path / "model")
    result = reduced(tmp_path, "aligned", experts=5, merge={"method": "average", "align": True}, groups=groups)
    reduced(tmp_path, "blind", experts=5, merge="average", groups=groups)
    before = read_values(tmp_path / "model")
    for choice in result.choice.layers:
        centre = int(choice.centre_E[1])
        assert int(choice.centre_E[5]) == centre and len(choice.members(centre)) == 2
        slot = choice.kept.index(centre)
        for part in ("gate", "up", "down"):
            own = matrix(before, choice.layer, centre, part)
            np.testing.assert_allclose(matrix(read_values(tmp_path / "aligned"), choice.layer, slot, part), own, atol=1e-6)
            assert np.abs(matrix(read_values(tmp_path / "blind"), choice.layer, slot, part) - own).max() > 0.01


def test_a_full_joint_subspace_is_the_average(tmp_path: Path) -> None:
    make(tmp_path / "model")
    reduced(tmp_path, "average", merge="average")
    full = {"method": "subspace", "rank": 1000}
    reduced(tmp_path, "full", merge=full)
    reduced(tmp_path, "white", merge={**full, "whiten": True})
    result = reduced(tmp_path, "some", merge={"method": "subspace", "rank": 3})
    average, some = read_values(tmp_path / "average"), read_values(tmp_path / "some")
    for other in ("full", "white"):
        for name, array in read_values(tmp_path / other).items():
            np.testing.assert_allclose(array, average[name], atol=1e-6)
    choice = result.choice.layers[0]
    slot = next(s for s, expert in enumerate(choice.kept) if len(choice.members(expert)) > 1)
    assert np.linalg.matrix_rank(matrix(some, 0, slot, "down"), tol=1e-4) == 3


def test_a_fitted_fold_is_nearer_to_the_weighted_outputs(tmp_path: Path) -> None:
    """MergeMoE's inequality on the tokens of the first layer, whose inputs nothing has changed."""
    make(tmp_path / "model")
    result = reduced(tmp_path, "fitted", merge="fitted")
    reduced(tmp_path, "average", merge="average")
    whole, inputs = load(tmp_path / "model"), []
    block = whole.model.layers[0].mlp
    block.experts.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    from tests.reduction.mixtures import documents

    for document in documents(0) + documents(1):
        with torch.no_grad():
            whole(input_ids=torch.tensor([[int(word[1:]) for word in document.split()]]))
    inputs_TD = torch.cat(inputs).numpy().astype(np.float64)
    choice = result.choice.layers[0]

    def output(tensors: dict[str, np.ndarray], expert: int) -> np.ndarray:
        gate, up, down = (matrix(tensors, 0, expert, part).astype(np.float64) for part in ("gate", "up", "down"))
        gated = inputs_TD @ gate.T
        return (gated / (1 + np.exp(-gated)) * (inputs_TD @ up.T)) @ down.T

    before = read_values(tmp_path / "model")
    for slot, expert in enumerate(choice.kept):
        if len(choice.members(expert)) > 1:
            target_TD = sum(w * output(before, m) for w, m in zip(choice.weights(expert), choice.members(expert), strict=True))
            errors = [np.linalg.norm(output(read_values(tmp_path / out), slot) - target_TD) for out in ("fitted", "average")]
            assert errors[0] < 0.9 * errors[1]


def test_a_method_folds_by_the_plan_and_needs_its_base(tmp_path: Path) -> None:
    make(tmp_path / "model")
    result = reduced(tmp_path, merge={"method": "task_arithmetic", "scale": 0.5, "base": 0})
    before, after = read_values(tmp_path / "model"), read_values(tmp_path / "out")
    for choice in result.choice.layers:
        for slot, expert in enumerate(choice.kept):
            members = choice.members(expert)
            if len(members) > 1:
                base = matrix(before, choice.layer, 0, "up").astype(np.float64)
                weights = choice.weights(expert)
                expected = base + 0.5 * sum(
                    w * (matrix(before, choice.layer, m, "up") - base) for w, m in zip(weights, members, strict=True)
                )
                np.testing.assert_allclose(matrix(after, choice.layer, slot, "up"), expected, atol=1e-5)


def test_a_fitted_router_is_nearer_to_the_old_choice(tmp_path: Path) -> None:
    make(tmp_path / "model")
    pruned = reduced(tmp_path, "pruned", router="fit")
    # on inputs that nothing has changed, slicing is exact already; only the drift of later layers is repaired
    assert pruned.routers[0][0] < 1e-9
    assert pruned.routers[1][1] <= pruned.routers[1][0]
    folded = reduced(tmp_path, "folded", merge="average", router="fit")
    assert all(after < 0.8 * before for before, after in folded.routers.values())
    sliced = reduced(tmp_path, "sliced", merge="average")
    assert sliced.routers == {}
    one, other = read_tensors(tmp_path / "folded"), read_tensors(tmp_path / "sliced")
    changed = [name for name in one if one[name].tobytes() != other[name].tobytes()]
    assert sorted(changed) == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    assert float((logits(load(tmp_path / "folded")) - logits(load(tmp_path / "sliced"))).abs().max()) > 1e-3
