"""What cannot be reduced is refused in a sentence, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.command import moerge as command
from tests.helpers.tiny import edit_config, make_models, read_values, write_checkpoint
from tests.reduction.mixtures import make, recipe


def refused(path: Path, out: Path, *parts: str) -> None:
    """Assert one sentence with all parts, and nothing under the target's name."""
    result = command("reduce", path, out)
    assert (result.code, result.out) == (2, ""), result
    lines = result.err.splitlines()
    assert len(lines) == 1, result.err
    assert all(part in lines[0] for part in parts), lines[0]
    assert not out.exists()


SETTINGS: tuple[tuple[dict[str, Any], tuple[str, ...]], ...] = (
    ({"experts": 1}, ("reduce.experts", "top_k")),
    ({"experts": 7}, ("reduce.experts", "6")),
    ({"top_k": 3}, ("reduce.top_k", "2")),
    ({"experts": 0}, ("reduce.experts", "1")),
    ({"score": "raep"}, ("reduce.score", "reap")),
    ({"score": {"mean": True, "gate": 3, "norm": 0}}, ("reduce.score",)),
    ({"merge": "avrage"}, ("reduce.merge", "average")),
    ({"merge": "ties"}, ("reduce.merge", "base")),
    ({"merge": {"method": "ties", "base": "9"}}, ("base", "9")),
    ({"merge": "regmean"}, ("reduce.merge", "regmean")),
    ({"merge": {"method": "subspace"}}, ("rank",)),
    ({"merge": "average", "capacity": 1}, ("capacity",)),
    ({"experts": 2, "merge": "average", "capacity": 2, "protect": "none"}, ("capacity",)),
    ({"grops": "ream"}, ("grops", "groups")),
    ({"router": "guess"}, ("router",)),
)


@pytest.mark.parametrize(("settings", "parts"), SETTINGS, ids=[repr(one) for one, _ in SETTINGS])
def test_settings_that_cannot_be(settings: dict[str, Any], parts: tuple[str, ...], tmp_path: Path) -> None:
    make(tmp_path / "model")
    refused(recipe(tmp_path, **settings), tmp_path / "out", *parts)


def test_fewer_experts_than_each_token_goes_to_are_possible_with_a_lower_number(tmp_path: Path) -> None:
    make(tmp_path / "model")
    assert command("reduce", recipe(tmp_path, experts=1, top_k=1, protect="none"), tmp_path / "out").code == 0


def test_a_dense_model_has_nothing_to_reduce(tmp_path: Path) -> None:
    make_models(tmp_path)
    refused(recipe(tmp_path, "base"), tmp_path / "out", "llama", "mixture")


def test_text_is_needed(tmp_path: Path) -> None:
    make(tmp_path / "model")
    refused(recipe(tmp_path, text=False), tmp_path / "out", "calibration")
    refused(recipe(tmp_path, text=False, statistics="none"), tmp_path / "out", "none", "calibration")
    refused(recipe(tmp_path, text=False, statistics="none", router="fit"), tmp_path / "out", "calibration")


def test_a_domain_without_tokens_is_named(tmp_path: Path) -> None:
    make(tmp_path / "model")
    path = recipe(tmp_path)
    (tmp_path / "code.jsonl").write_text('{"text": " "}\n')
    refused(path, tmp_path / "out", "calibration.code")


def test_experts_of_unequal_shapes_are_named(tmp_path: Path) -> None:
    make(tmp_path / "model")
    tensors = read_values(tmp_path / "model")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    tensors[name] = np.zeros((40, 32), np.float32)
    import json

    write_checkpoint(tmp_path / "model", tensors, json.loads((tmp_path / "model" / "config.json").read_text()), dtype="F32")
    refused(recipe(tmp_path), tmp_path / "out", name, "40")


def test_routing_within_groups_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "model")
    edit_config(tmp_path / "model", n_group=2)
    refused(recipe(tmp_path), tmp_path / "out", "n_group")


def test_statistics_of_another_model_or_file_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "model")
    make(tmp_path / "other", seed=2)
    make(tmp_path / "wider", experts=5)
    assert command("reduce", recipe(tmp_path), tmp_path / "first").code == 0
    refused(recipe(tmp_path, "other", text=False, statistics="first.statistics"), tmp_path / "out", "another model")
    refused(recipe(tmp_path, "wider", text=False, statistics="first.statistics"), tmp_path / "out", "another model")
    refused(recipe(tmp_path, text=False, statistics="first.statistics", merge="average"), tmp_path / "out", "calibration")
    refused(recipe(tmp_path, text=False, statistics="model"), tmp_path / "out", "statistics")


def test_a_recipe_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("experts: {a: b}\n")
    refused(tmp_path / "recipe.yaml", tmp_path / "out", "experts")
