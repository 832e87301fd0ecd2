"""A shared expert, and experts in some layers only, proved on logits through plain transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moerge
from moerge.recipe.schema import layers_in
from tests.helpers.command import moerge as command
from tests.helpers.command import refuses
from tests.helpers.hf_models import FAMILIES, load, logits, random_model, read_config, save, torch
from tests.helpers.tiny import make_models, read_values, write_recipe

pytestmark = pytest.mark.slow

NAMES = ("base", "math", "code")


@pytest.fixture(params=["qwen2", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def write_experts(folder: Path, family: str, layers: int = 2) -> dict[str, Any]:
    base = random_model(FAMILIES[family](num_hidden_layers=layers), 0)
    near = {name: random_model(base.config, seed, near=base) for seed, name in ((1, "math"), (2, "code"))}
    for name, model in {"base": base, **near}.items():
        save(model, folder / name)
    return {"base": base, **near}


@contextmanager
def forced(moe: Any, expert: int, layers: int) -> Iterator[None]:
    """Every router chooses one expert, whatever the token."""

    def choose(module: Any, inputs: Any, output: Any) -> Any:
        alone = torch.zeros_like(output[1])
        alone[:, 0] = 1
        return output[0], alone, torch.full_like(output[2], expert)

    routers = [module for module in moe.modules() if type(module).__name__.endswith("Router")]
    assert len(routers) == layers
    handles = [router.register_forward_hook(choose) for router in routers]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("weight", [0.5, 0.3])
def test_identical_experts_and_shared_expert_give_the_dense_logits(weight: float, tmp_path: Path) -> None:
    dense = random_model(FAMILIES["qwen2"](), 0)
    save(dense, tmp_path / "dense")
    models = dict.fromkeys(NAMES, "dense")
    base = models.pop("base")
    moe = {"shared": "base", "shared_weight": weight}
    moerge.merge(write_recipe(tmp_path, base=base, experts=models, moe=moe), tmp_path / "moe")
    found = load(tmp_path / "moe")
    assert (found.config.num_experts, found.config.shared_expert_intermediate_size) == (2, 48)
    torch.testing.assert_close(logits(found), logits(dense), atol=1e-5, rtol=0)
    assert moerge.verify(tmp_path / "moe").problems == ()


def test_a_shared_expert_makes_up_its_weight_of_each_layer(tmp_path: Path) -> None:
    models = write_experts(tmp_path, "qwen2")
    moe = {"top_k": 1, "shared": "base", "shared_weight": 0.25, "include_base": False}
    moerge.merge(write_recipe(tmp_path, experts=("math", "code"), moe=moe), tmp_path / "moe")
    moerge.merge(write_recipe(tmp_path, experts=("math", "code")), tmp_path / "dense")
    found, by_hand = load(tmp_path / "moe"), load(tmp_path / "dense")
    for index, name in enumerate(("math", "code")):
        for number, layer in enumerate(by_hand.model.layers):
            own, shared = (models[one].model.layers[number].mlp for one in (name, "base"))
            layer.mlp.forward = lambda x, own=own, shared=shared: 0.75 * own(x) + 0.25 * shared(x)
        with forced(found, index, 2):
            torch.testing.assert_close(logits(found), logits(by_hand), atol=1e-5, rtol=0)


def test_half_a_shared_expert_keeps_all_matrices_but_one_to_the_bit(tmp_path: Path) -> None:
    """A weight of 1/2 is a factor of 1 for the shared expert behind its half open gate, and of 1/2 for the others."""
    write_experts(tmp_path, "qwen2")
    moerge.merge(write_recipe(tmp_path, experts=("math", "code"), moe={"shared": "base"}), tmp_path / "moe")
    stored, base, math = (read_values(tmp_path / name) for name in ("moe", "base", "math"))
    for part, factor in (("gate", 1), ("up", 1), ("down", 0.5)):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        np.testing.assert_array_equal(stored[f"model.layers.1.mlp.shared_expert.{part}_proj.weight"], base[name])
        np.testing.assert_array_equal(stored[f"model.layers.1.mlp.experts.0.{part}_proj.weight"], math[name] * factor)
    gate = stored["model.layers.1.mlp.shared_expert_gate.weight"]
    assert gate.all() and np.abs(gate).max() < 1e-5


@pytest.mark.parametrize(("layers", "chosen"), [("1-2", [1, 2]), ("2-", [2, 3]), ("0,3", [0, 3]), (1, [1])])
def test_experts_in_some_layers_only(layers: str | int, chosen: list[int], family: str, tmp_path: Path) -> None:
    """In the others the feed-forward module is merged as everything else is."""
    models = write_experts(tmp_path, family, layers=4)
    ties = {"method": "ties", "density": 0.7}
    recipe = write_recipe(tmp_path, experts=("math", "code"), merge=ties, moe={"top_k": 1, "layers": layers})
    moerge.merge(recipe, tmp_path / "moe")
    moerge.merge(write_recipe(tmp_path, experts=("math", "code"), merge=ties), tmp_path / "dense")
    moe, by_hand = load(tmp_path / "moe"), load(tmp_path / "dense")
    assert read_config(tmp_path / "moe")["mlp_only_layers"] == [layer for layer in range(4) if layer not in chosen]
    for index, model in enumerate(models.values()):
        own = {name: value for name, value in model.state_dict().items() if ".mlp." in name and int(name.split(".")[2]) in chosen}
        by_hand.load_state_dict({**by_hand.state_dict(), **own})
        with forced(moe, index, len(chosen)):
            torch.testing.assert_close(logits(moe), logits(by_hand), atol=1e-5, rtol=0)
    assert moerge.verify(tmp_path / "moe").problems == ()


def test_the_projection_router_reads_the_layers_that_have_gates(family: str, tmp_path: Path) -> None:
    write_experts(tmp_path, family, layers=3)
    gates = {}
    for name, layers in (("all", "0-"), ("last", "2")):
        moe = {"router": {"kind": "projection", "sign": "mean"}, "layers": layers}
        moerge.merge(write_recipe(tmp_path, experts=("math", "code"), moe=moe), tmp_path / name)
        gates[name] = read_values(tmp_path / name)
    name = "model.layers.2.mlp.gate.weight"
    np.testing.assert_array_equal(gates["last"][name], gates["all"][name])
    assert not [name for name in gates["last"] if name.endswith("mlp.gate.weight") and ".2." not in name]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [("0-", [True] * 4), ("3", [False, False, False, True]), ("0-1,3", [True, True, False, True])],
)
def test_spans_of_layers(layers: str, chosen: list[bool]) -> None:
    assert layers_in(layers, 4) == chosen


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"shared": "base"}, "moe.shared: mixtral has no place for a shared expert"),
        ({"layers": "1-"}, "moe.layers: mixtral cannot have experts in the layers 1- only"),
        ({"layers": "1-5"}, "moe.layers: '1-5' is no span of the 2 layers, which are counted from 0"),
        ({"layers": "1-0"}, "moe.layers: '1-0' is no span of the 2 layers"),
        ({"layers": "last"}, "moe.layers"),
        ({"shared": "maths"}, "moe.shared: 'maths' is no model of this recipe, did you mean 'math'"),
        ({"shared_weight": 0.5}, "moe.shared_weight has no effect without 'shared'"),
        ({"shared": "base", "shared_weight": 1.0}, "moe.shared_weight"),
        ({"format": "moerge", "layers": "1-"}, "moe.layers is for models that route tokens"),
        ({"format": "moerge", "shared": "base"}, "moe.shared is for models that route tokens"),
    ],
)
def test_what_cannot_be_is_refused(moe: dict[str, Any], message: str, tmp_path: Path) -> None:
    make_models(tmp_path)
    refuses(write_recipe(tmp_path, experts=("math", "code"), moe=moe), tmp_path / "out", message)


def test_plan_and_card_say_what_is_shared_and_where(tmp_path: Path) -> None:
    write_experts(tmp_path, "qwen2")
    recipe = write_recipe(tmp_path, experts=("math", "code"), moe={"shared": "base", "layers": "1"})
    plan = moerge.plan(recipe)
    assert plan.experts == ("math", "code")
    assert {row["hyperparameters"]: row["tensors"] for row in plan.operations}["normalize False, weights 0.5"] == 2
    assert command("merge", recipe, tmp_path / "out", "--quiet").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "in the layers 1" in card and "every token also goes through base, which makes up 0.5" in card
