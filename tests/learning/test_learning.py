"""What learning must recover, and what it must leave alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_limits
from transformers import AutoModelForCausalLM

from moerge.learning.flow import Learned, learn_coefficients
from moerge.learning.model import MergingModel
from moerge.learning.run import with_coefficients
from moerge.merging.pipeline import merge
from moerge.planning.build import build_plan
from tests.helpers.tiny import llama_config, llama_tensors, make_models, write_checkpoint
from tests.learning.learn_models import dense_plan, make_recipe, slots_of

pytestmark = pytest.mark.slow


def run(recipe: Any) -> Learned:
    return learn_coefficients(recipe, dense_plan(recipe), recipe.learn)


def trained_hard(folder: Path, changed: dict[str, str]) -> dict[str, Path]:
    """Float32 models of one layer: each expert differs from the base, by much, in the tensors whose names hold its text.

    The head is large, so that predictions are far from uniform and tell the experts apart.
    """
    config = llama_config(num_hidden_layers=1)
    base = llama_tensors(config)
    base["lm_head.weight"] = 10 * base["lm_head.weight"]
    base["model.embed_tokens.weight"] = 10 * base["model.embed_tokens.weight"]
    models = {"base": write_checkpoint(folder / "base", base, config, dtype="F32")}
    for seed, (expert, text) in enumerate(changed.items(), 1):
        other = llama_tensors(config, seed=seed)
        factor = {name: 6 if "q_proj" in name or "k_proj" in name else 2 for name in base}  # else attention hardly looks anywhere
        tensors = {name: values + (factor[name] * other[name] if text in name else 0) for name, values in base.items()}
        models[expert] = write_checkpoint(folder / expert, tensors, config, dtype="F32")
    return models


def mean_coefficient(found: Learned, text: str, expert: int) -> float:
    rows = [rows[expert][0] for name, rows in found.coefficients.by_tensor.items() if text in name]
    return sum(rows) / len(rows)


def test_one_expert_alone_converges_to_itself(tmp_path: Path) -> None:
    models = trained_hard(tmp_path, {"math": "_proj"})
    learn = {"gamma": 0.0, "epochs": 40, "accumulation": 4, "patience": 0}
    found = run(make_recipe(tmp_path, experts=["math"], models=models, learn=learn))
    assert min(rows[0][0] for rows in found.coefficients.by_tensor.values()) > 0.95
    curve = [row["heldout"] for row in found.stages[0].rows]
    floor = _entropy_of_expert(models["math"])
    assert min(curve) - floor < 0.05 * (curve[0] - floor)


def _entropy_of_expert(folder: Path) -> float:
    """The least that the objective can be: the entropy of the expert's own predictions on the held-out text."""
    import json
    import random

    from transformers import AutoModelForCausalLM, AutoTokenizer

    lines = (folder.parent / "math.jsonl").read_text().splitlines()
    order = random.Random("0 0").sample(range(5), 5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(json.loads(lines[order[0]])["text"])["input_ids"]])
    with torch.no_grad():
        log_TV = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[0].log_softmax(-1)
    return float(-(log_TV.exp() * log_TV).sum(-1).mean())


def test_two_experts_that_changed_different_tensors_are_both_recovered(tmp_path: Path) -> None:
    models = trained_hard(tmp_path, {"math": "mlp", "code": "self_attn"})
    learn = {"gamma": 0.0, "epochs": 30, "accumulation": 8, "patience": 0}
    found = run(make_recipe(tmp_path, experts=["math", "code"], models=models, learn=learn))
    assert mean_coefficient(found, "mlp", 0) > 0.6
    assert mean_coefficient(found, "self_attn", 1) > 0.6


@pytest.mark.parametrize("gamma", [1e6, math.inf])
def test_a_heavy_regulariser_returns_task_arithmetic_exactly(tmp_path: Path, gamma: float) -> None:
    found = run(make_recipe(tmp_path, learn={"gamma": gamma, "epochs": 2, "extra": 0.5}))
    values = {value for rows in found.coefficients.by_tensor.values() for row in rows for value in row}
    assert values == {float(torch.sigmoid(torch.tensor(math.log(0.3 / 0.7))))}


def test_the_same_seed_gives_the_same_coefficients_and_another_does_not(tmp_path: Path) -> None:
    learn: dict[str, Any] = {"gamma": 0.0, "accumulation": 2}
    first = run(make_recipe(tmp_path, learn=learn)).coefficients
    again = run(make_recipe(tmp_path, learn=learn)).coefficients
    other = run(make_recipe(tmp_path, learn={**learn, "seed": 1})).coefficients
    assert first == again
    assert other.learning["stages"] != first.learning["stages"]


def test_an_expert_that_is_switched_off_is_reported(tmp_path: Path) -> None:
    models = trained_hard(tmp_path, {"math": "_proj", "code": "_proj"})
    learn = {"gamma": 0.0, "epochs": 30, "accumulation": 8, "patience": 0, "task_weights": {"code": 0.0}}
    found = run(make_recipe(tmp_path, experts=["math", "code"], models=models, learn=learn))
    assert any(text.startswith("learning switched code off: its mean coefficient is ") for text in found.warnings), found


def test_entropy_lowers_the_entropy_of_predictions(tmp_path: Path) -> None:
    models = trained_hard(tmp_path, {"math": "_proj", "code": "_proj"})
    learn = {"objective": "entropy", "gamma": 0.0, "epochs": 20, "accumulation": 10, "heldout": 0.0, "texts": 5}
    found = run(make_recipe(tmp_path, experts=["math", "code"], models=models, learn=learn))
    curve = [row["train"] for row in found.stages[0].rows]
    assert curve[-1] < 0.8 * curve[0]


def test_a_layer_shares_its_coefficients(tmp_path: Path) -> None:
    found = run(make_recipe(tmp_path, learn={"granularity": "layer", "gamma": 0.0, "heldout": 0.0}))
    by_layer: dict[str, set[Any]] = {}
    for name, rows in found.coefficients.by_tensor.items():
        by_layer.setdefault(name.split(".")[2], set()).add(rows)
    assert {layer: len(rows) for layer, rows in by_layer.items()} == {"0": 1, "1": 1}
    assert len({row for rows in by_layer.values() for row in rows}) == 2


def test_more_chunks_go_to_the_tensors_that_matter(tmp_path: Path) -> None:
    models = trained_hard(tmp_path, {"math": "down_proj", "code": "down_proj"})
    recipe = make_recipe(tmp_path, experts=["math", "code"], models=models, learn={"extra": 0.5, "heldout": 0.0})
    found = run(recipe).coefficients
    counts = {name: len(rows[0]) for name, rows in found.by_tensor.items()}
    assert sum(counts.values()) == 7 + 4
    assert {name for name, count in counts.items() if count > 1} == {name for name in counts if "down_proj" in name}
    assert set(found.chunk_sizes) == {name for name, count in counts.items() if count > 1}


def test_few_targets_are_much_like_all(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype="F32")
    learn: dict[str, Any] = {"gamma": 0.0, "heldout": 0.0}
    whole = run(make_recipe(tmp_path, models=models, learn=learn)).coefficients
    most = run(make_recipe(tmp_path, models=models, learn={**learn, "targets": 64})).coefficients
    few = run(make_recipe(tmp_path, models=models, learn={**learn, "targets": 4})).coefficients
    assert most.by_tensor == whole.by_tensor
    assert few.by_tensor != whole.by_tensor
    assert np.isfinite(list(few.means().values())).all()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype="F32", tied=True)
    found = run(make_recipe(tmp_path, models=models, learn={"gamma": 0.0, "heldout": 0.0, "learning_rate": 1.0}))
    assert len(found.coefficients.by_tensor) == 14
    assert {row for rows in found.coefficients.by_tensor.values() for row in rows} != {(0.3,)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("F32", 1e-6), ("BF16", 0.01)])
def test_a_tied_embedding_that_learns_is_the_head_too(tmp_path: Path, dtype: str, tolerance: float) -> None:
    models = make_models(tmp_path, dtype=dtype, tied=True)
    learn = {"gamma": 0.0, "heldout": 0.0, "learning_rate": 1.0, "roles": ["embedding", "attention"]}
    recipe = make_recipe(tmp_path, models=models, learn=learn)
    plan, found = dense_plan(recipe), run(recipe).coefficients
    assert "model.embed_tokens.weight" in found.by_tensor
    merge(build_plan(with_coefficients(recipe, found)), tmp_path / "out")
    coef_logits = {name: torch.logit(torch.tensor(rows)) for name, rows in found.by_tensor.items()}
    model = MergingModel(plan.config, slots_of(recipe), coef_logits, found.fixed, dtype="float32", device="cpu")
    ids_1T = torch.tensor([[1, 5, 9, 12, 7, 33, 21]])
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        learned_TV, merged_TV = model.forward({"input_ids": ids_1T}, 0).logits[0], whole(ids_1T).logits[0]
    torch.testing.assert_close(learned_TV, merged_TV, rtol=0, atol=tolerance)


def test_the_recipe_says_on_how_many_threads_and_the_environment_does_not_matter(tmp_path: Path) -> None:
    models = make_models(tmp_path, dtype="F32", config={"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1})
    before, found = torch.get_num_threads(), {}
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for fixed in (1, None):
                learn = {"heldout": 0.0, "learning_rate": 1.0, "threads": fixed, "extra": 1.0, "accumulation": 1}
                found[threads, fixed] = run(make_recipe(tmp_path, models=models, texts=2, learn=learn)).coefficients.to_json()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found[1, 1] == found[3, 1]
    assert {key: value["learning"]["settings"]["threads"] for key, value in found.items()} == {
        (1, 1): 1,
        (3, 1): 1,
        (1, None): 1,
        (3, None): 3,
    }
    assert found[1, None] == found[1, 1]


def test_norms_do_not_depend_on_threads(tmp_path: Path) -> None:
    models = make_models(tmp_path, experts=["math"], dtype="F32", config={"hidden_size": 512, "intermediate_size": 1024})
    recipe = make_recipe(tmp_path, experts=["math"], models=models, learn={})
    found = []
    for threads in (1, 2, 3):
        with threadpool_limits(threads):
            found.append([slot.directions.norms() for slot in slots_of(recipe) if slot.directions is not None])
    assert found[0] == found[1] == found[2]
