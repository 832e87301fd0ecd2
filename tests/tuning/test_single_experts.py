"""One expert of a mixture trained alone: by name, in a tensor that holds all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moerge.tuning.parts import Schedule
from moerge.tuning.run import tune
from tests.helpers.command import moerge
from tests.helpers.tiny import read_tensors
from tests.tuning.tune_models import moved, rows, run, stop_after, write_tuning

pytestmark = pytest.mark.slow

PREFIX = "model.layers.{}.block_sparse_moe.experts.{}."


def of_experts(*numbers: int) -> set[str]:
    return {PREFIX.format(layer, number) + f"w{w}.weight" for layer in (0, 1) for number in numbers for w in (1, 2, 3)}


def test_one_expert_by_its_name_in_the_manifest(folder: Path) -> None:
    """The others keep their bytes, weight decay included."""
    facts = run(folder, "math-only", train="experts.math", weight_decay=0.5, accumulation=2)
    assert facts["trained_parameters"] == 2 * 3 * 16 * 24
    assert moved(folder / "moe", folder / "math-only") == of_experts(1)
    assert all(row["grad_norm"] > 0 for row in rows(folder / "math-only"))


def test_all_slices_are_the_whole(folder: Path) -> None:
    """Trained slice by slice, an expert tensor becomes what it becomes as a whole: the same gradients, norms, decay and steps."""
    settings: dict[str, Any] = {"weight_decay": 0.5, "steps": 3, "clip": 0.01, "schedule": "linear"}
    run(folder, "slices", train=["experts.base", "experts.math", "experts.code", "experts.knowledge"], **settings)
    run(folder, "whole", train="experts", **settings)
    mine, theirs = read_tensors(folder / "slices"), read_tensors(folder / "whole")
    for name, value in theirs.items():
        np.testing.assert_array_equal(mine[name], value, err_msg=name)
    assert rows(folder / "slices") == rows(folder / "whole")


def test_experts_open_one_after_the_other_and_runs_resume(folder: Path) -> None:
    settings: dict[str, Any] = {"train": "router", "steps": 6, "save_every": 1, "learning_rate": 1e-2}
    settings["opens"] = [{"step": 2, "train": "experts.code"}, {"step": 4, "train": ["experts.base", "backbone"]}]
    facts = run(folder, "opened", **settings)
    assert facts["trained_parameters"] == facts["parameters"]["router"] + facts["parameters"]["backbone"] + 2 * 2 * 3 * 16 * 24
    assert {name for name in moved(folder / "moe", folder / "opened") if ".experts." in name} == of_experts(0, 2)
    path = write_tuning(folder, "parts.yaml", **settings)
    with pytest.raises(KeyboardInterrupt):
        tune(path, folder / "parts", progress=stop_after(4))
    tune(path, folder / "parts", resume=True)
    assert rows(folder / "parts") == rows(folder / "opened")
    assert moved(folder / "moe", folder / "parts") == moved(folder / "moe", folder / "opened")


def test_an_expert_by_number_where_nobody_named_them(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "moe").mkdir()
    for file in (folder / "moe").iterdir():
        if file.name != "moerge.json":
            (tmp_path / "moe" / file.name).write_bytes(file.read_bytes())
    run(folder, "second", model=str(tmp_path / "moe"), train="experts.2", steps=1)
    assert moved(folder / "moe", folder / "second") == of_experts(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": "experts.maths"}, "train: there is no 'experts.maths', did you mean 'experts.math'"),
        (
            {"train": "experts.math", "model": "math"},
            "'experts.math' is none of router, projectors, experts, backbone, all, and no",
        ),
    ],
)
def test_mistakes(folder: Path, changes: dict[str, Any], message: str) -> None:
    assert message in moerge("tune", write_tuning(folder, "bad.yaml", **changes), folder / "never").err


def test_a_schedule_of_slices() -> None:
    schedule = Schedule(
        ((0, frozenset({"a[1]", "b"})), (2, frozenset({"a[0]"})), (5, frozenset({"a"})), (6, frozenset({"c[3]"})))
    )
    assert schedule.ever_trained == {"a", "b", "c"} and schedule.sliced == {"a", "c"}
    assert [schedule.slices(step) for step in (0, 2, 5, 6)] == [{"a": [1]}, {"a": [0, 1]}, {}, {"c": [3]}]
    assert schedule.frozen(0) == {"c"} and schedule.frozen(6) == set()
    assert schedule.trained({"a": (4, 2, 3), "b": (7,), "c": (4, 5)}) == 24 + 7 + 5


def test_the_skeletons_slices_are_the_experts(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from moerge.tuning.parts import parts_of

    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder / "moe", dtype=torch.float32)
    assert {part for part in parts_of(model, ("base", "math", "code", "knowledge")) if "." in part} == {
        "experts.base",
        "experts.math",
        "experts.code",
        "experts.knowledge",
    }
