"""What a tuning begins with or ends in that is not as it should be: weights that are missing, numbers too large, full disks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge.errors import MachineError
from moerge.tuning.run import tune
from tests.helpers.command import moerge
from tests.helpers.recorded import Recorded
from tests.helpers.tiny import make_models, read_tensors, read_values, write_checkpoint
from tests.tuning.tune_models import make_moe, moved, refused, rows, run, write_tuning

pytestmark = pytest.mark.slow


def without(source: Path, target: Path, *names: str) -> Path:
    """A copy of a checkpoint that lacks tensors."""
    values = read_values(source)
    for name in names:
        del values[name]
    return write_checkpoint(target, values, json.loads((source / "config.json").read_text()), dtype="F32")


@pytest.mark.parametrize("by_sequence", [False, True], ids=["native", "routed"])
def test_missing_weights_are_not_made_up(by_sequence: bool, tmp_path: Path) -> None:
    make_moe(tmp_path, by_sequence=by_sequence)
    name = "model.layers.1.self_attn.q_proj.weight" if not by_sequence else "model.layers.1.mlp.1.up_proj.weight"
    hole = without(tmp_path / "moe", tmp_path / "hole", name)
    said = refused(write_tuning(tmp_path, model="hole", train="router"), tmp_path / "out")
    assert said == f"moerge: {hole} lacks tensors of its model, {name!r}: it would run on random numbers, so copy it again\n"


def test_a_native_mixture_without_an_expert_is_refused(folder: Path, tmp_path: Path) -> None:
    without(folder / "moe", folder / "hole", "model.layers.0.block_sparse_moe.experts.2.w1.weight")
    said = refused(write_tuning(folder, model="hole", train="router"), tmp_path / "out")
    assert f"transformers cannot load {folder / 'hole'}: " in said


def test_a_teacher_without_some_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    without(folder / "math", folder / "half", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    data = {name: {"path": f"{name}.jsonl", "teacher": name} for name in ("base", "math")}
    data["math"]["teacher"] = "half"
    path = write_tuning(folder, data=data, losses={"distillation": {"weight": 1.0}})
    assert (
        "half lacks tensors of its model, 'model.layers.0.mlp.up_proj.weight' and 1 more"
        in moerge("tune", path, tmp_path / "out").err
    )


def test_what_is_not_trained_keeps_its_bytes_in_a_checkpoint_of_mixed_types(tmp_path: Path) -> None:
    make_models(tmp_path, dtype=lambda name: "F32" if "norm" in name else "BF16")
    run(tmp_path, "out", model="base", train="lm_head*", steps=2)
    assert moved(tmp_path / "base", tmp_path / "out") == {"lm_head.weight"}
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "out")
    assert {name: value.dtype for name, value in before.items()} == {name: value.dtype for name, value in after.items()}
    run(tmp_path, "half", model="base", train="lm_head*", steps=2, save_dtype="bfloat16")
    assert {value.dtype for value in read_tensors(tmp_path / "half").values()} == {before["lm_head.weight"].dtype}


def test_weights_that_are_no_numbers_are_not_published(folder: Path) -> None:
    path = write_tuning(folder, learning_rate=1e6, steps=1, save_dtype="float16", train="experts")
    result = moerge("tune", path, folder / "huge", "--quiet")
    assert result.code == 2 and not (folder / "huge").exists()
    assert "has come to hold NaN or infinity, as F16 stores it: lower learning_rate, or choose another save_dtype" in result.err


def test_the_row_before_the_first_step_comes_once(folder: Path) -> None:
    path = write_tuning(folder, steps=2, heldout={"math": "math.jsonl"}, save_every=2)

    def stops(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(path, folder / "once", progress=Recorded(stops))
    tune(path, folder / "once", resume=True)
    assert [row["step"] for row in rows(folder / "once")] == [0, 1, 2]


def test_a_report_has_what_went_into_a_tuned_checkpoint(folder: Path, tmp_path: Path) -> None:
    run(folder, "reported", steps=1)
    result = moerge("report", folder / "reported", "--out", tmp_path / "report.html")
    assert (result.code, result.err) == (0, ""), result
    assert "tensors read" in (tmp_path / "report.html").read_text()


def test_warnings_are_said_quietly_too(folder: Path) -> None:
    result = moerge("tune", write_tuning(folder, steps=60, data={"math": "math.jsonl"}), folder / "quiet", "--quiet")
    assert (result.code, result.out) == (0, "")
    assert "data.math is read" in result.err and "times: add text, or lower its weight" in result.err


def test_an_adapter_is_no_model(folder: Path) -> None:
    run(folder, "adapter", adapters={"rank": 2, "save": "adapter"}, steps=1)
    said = refused(write_tuning(folder, model="adapter"), folder / "never")
    assert "model is adapter, an adapter and no model: merge it with its base first" in said


def test_names_that_cannot_be_written(folder: Path) -> None:
    path = write_tuning(folder, steps=1)
    assert "is too long for a folder: choose a shorter one" in moerge("tune", path, folder / ("x" * 250)).err
    (folder / "dangling").symlink_to(folder / "nowhere")
    said = moerge("tune", path, folder / "dangling").err
    assert "dangling is a link to something that is not there: remove it, or choose another folder" in said


def test_a_disk_that_is_full_is_said_in_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says where the disk ends within a tensor."""
    from moerge.tuning import trainer

    def fails(*arguments: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:868] . unexpected pos 53696 vs 53584")

    monkeypatch.setattr(trainer.torch, "save", fails)
    with pytest.raises(MachineError, match=r"^no space left for a training checkpoint: free some and run the same command again"):
        tune(write_tuning(folder, steps=2, save_every=1), folder / "full")


def test_the_disk_has_room_for_what_lies_there_at_once(folder: Path) -> None:
    whole = 4 * sum(int(np.prod(value.shape)) for value in read_values(folder / "moe").values())
    figures = moerge("tune", write_tuning(folder), "--dry-run", "--json").json
    assert figures["disk_bytes"] == 3 * figures["checkpoint_bytes"] == 9 * whole
    figures = moerge("tune", write_tuning(folder, adapters={"rank": 1}), "--dry-run", "--json").json
    assert figures["disk_bytes"] == 2 * figures["checkpoint_bytes"] + whole
