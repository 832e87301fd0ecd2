"""Recipes over experts of native mixtures: drop, reorder, repeat, graft; against the mixtures' own bytes and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moerge
from moerge.errors import InputError
from tests.checkpoint.test_expert import MIXTURES
from tests.helpers.hf_models import CASES, load, logits, random_model, read_config, save
from tests.helpers.tiny import read_tensors

KEEP = {"router": {"kind": "keep"}}


def graft(folder: Path, *references: str, **moe: Any) -> Path:
    """The mixture of these experts, with their routers' rows."""
    experts = {f"e{number}": f"{folder}/{reference}" for number, reference in enumerate(references)}
    return moerge.merge({"experts": experts, "moe": {**KEEP, **moe}}, folder / f"out-{'-'.join(references)}").folder


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("case", MIXTURES)
def test_all_experts_of_a_mixture_are_the_mixture(case: str, tmp_path: Path) -> None:
    model = random_model(CASES[case](), seed=1, dtype=torch.bfloat16)
    save(model, tmp_path / "moe")
    out = graft(tmp_path, "moe#0", "moe#1", "moe#2")
    before, after = read_tensors(tmp_path / "moe"), read_tensors(out)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    kept, config = read_config(out), read_config(tmp_path / "moe")
    assert {key: kept.get(key) for key in config if key != "transformers_version"} | {"rope_parameters": 0} == {
        key: value for key, value in config.items() if key != "transformers_version"
    } | {"rope_parameters": 0}


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe"])
def test_an_order_of_experts_means_nothing(case: str, tmp_path: Path) -> None:
    model = random_model(CASES[case](), seed=1)
    save(model, tmp_path / "moe")
    out = load(graft(tmp_path, "moe#2", "moe#0", "moe#1"))
    torch.testing.assert_close(logits(out), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["mixtral", "granitemoe", "olmoe"])
def test_dropped_and_grafted_experts_keep_their_bytes(case: str, tmp_path: Path) -> None:
    for seed, name in ((1, "one"), (2, "two")):
        save(random_model(CASES[case](), seed=seed, dtype=torch.bfloat16), tmp_path / name)
    sources = {name: load(tmp_path / name, dtype=torch.bfloat16).state_dict() for name in ("one", "two")}
    plan = moerge.plan({"experts": {"a": f"{tmp_path}/one#2", "b": f"{tmp_path}/two#0"}, "moe": KEEP})
    assert any("two" in warning and "not trained together" in warning for warning in plan.warnings)
    result = load(graft(tmp_path, "one#2", "two#0", "two#0"), dtype=torch.bfloat16).state_dict()
    for name, tensor in result.items():
        if ".experts." in name or name.endswith(("gate.weight", "router.weight", "router.layer.weight")):
            for row, (source, number) in enumerate((("one", 2), ("two", 0), ("two", 0))):
                assert torch.equal(tensor[row], sources[source][name][number]), name


def test_a_token_whose_experts_all_stay_gets_the_same_layer_output(tmp_path: Path) -> None:
    model = random_model(CASES["mixtral"](num_local_experts=4), seed=1)
    save(model, tmp_path / "moe")
    smaller = load(graft(tmp_path, "moe#0", "moe#1", "moe#3"))
    states = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(0))
    whole, part = model.model.layers[0].mlp, smaller.model.layers[0].mlp
    with torch.no_grad():
        chosen = (states.reshape(-1, 32) @ whole.gate.weight.T).topk(2).indices
        stay = (chosen != 2).all(dim=1)
        before, after = (found.reshape(-1, 32) for found in (whole(states), part(states)))
    assert 20 < stay.sum() < 180
    torch.testing.assert_close(after[stay], before[stay], rtol=1e-5, atol=1e-6)
    assert (after[~stay] - before[~stay]).abs().amax(dim=1).min() > 1e-3


def test_top_k_is_the_mixtures_and_never_more_than_there_are(tmp_path: Path) -> None:
    save(random_model(CASES["qwen3_moe"](num_experts=6, num_experts_per_tok=3), seed=1), tmp_path / "moe")
    assert read_config(graft(tmp_path, "moe#0", "moe#1", "moe#3", "moe#4"))["num_experts_per_tok"] == 3
    assert read_config(graft(tmp_path, "moe#0", "moe#1"))["num_experts_per_tok"] == 2
    assert read_config(graft(tmp_path, "moe#5", "moe#1", top_k=1))["num_experts_per_tok"] == 1


def test_a_dense_model_has_no_row_to_keep(tmp_path: Path) -> None:
    mixture = CASES["mixtral"]()
    save(random_model(mixture, seed=1), tmp_path / "moe")
    save(load_dense(tmp_path), tmp_path / "dense")
    with pytest.raises(InputError, match="new"):
        moerge.plan({"experts": {"old": f"{tmp_path}/moe#0", "new": f"{tmp_path}/dense"}, "moe": KEEP})
    plan = moerge.plan(
        {"experts": {"old": f"{tmp_path}/moe#0", "new": f"{tmp_path}/dense"}, "moe": {"router": {"kind": "random"}}}
    )
    assert plan.config["num_local_experts"] == 2


def load_dense(folder: Path) -> Any:
    """A dense model of the mixture in `folder`."""
    return load(moerge.merge({"experts": {"x": f"{folder}/moe#1"}}, folder / "x").folder)


def test_an_expert_of_olmoe_goes_into_no_other_format(tmp_path: Path) -> None:
    save(random_model(CASES["olmoe"](), seed=1), tmp_path / "moe")
    experts = {"a": f"{tmp_path}/moe#0", "b": f"{tmp_path}/moe#1"}
    with pytest.raises(InputError, match="mixtral"):
        moerge.plan({"experts": experts, "moe": {**KEEP, "format": "mixtral"}})


def test_inspect_says_how_experts_are_called(tmp_path: Path) -> None:
    save(random_model(CASES["olmoe"](), seed=1), tmp_path / "moe")
    found = moerge.inspect(tmp_path / "moe")
    assert found.to_json()["expert_references"] == {str(n): f"{tmp_path}/moe#{n}" for n in range(3)}
    named = moerge.merge({"experts": {"a": f"{tmp_path}/moe#2", "b": f"{tmp_path}/moe#0"}, "moe": KEEP}, tmp_path / "two").folder
    assert moerge.inspect(named).references == {"a": f"{named}#a", "b": f"{named}#b"}
    save(load_dense(tmp_path), tmp_path / "dense")
    assert moerge.inspect(tmp_path / "dense").references == {"0": f"{tmp_path}/dense#0"}
