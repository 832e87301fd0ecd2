"""TUNE.yaml: what it may say, where errors are, and launches that would do something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moerge.errors import InputError
from moerge.tuning.launch import check_launch
from moerge.tuning.settings import TuneConfig, load_tuning

GOOD: dict[str, Any] = {"model": "moe", "data": {"math": "math.jsonl"}, "steps": 10}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "tune.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**GOOD, **changes}.items() if v is not None}, sort_keys=False))
    return path


def test_defaults_are_the_papers(tmp_path: Path) -> None:
    settings = load_tuning(write(tmp_path)).settings
    assert (settings.train, settings.learning_rate, settings.weight_decay) == (("all",), 1e-5, 0.01)
    losses = settings.losses
    assert (losses.cross_entropy, losses.load_balance, losses.router_z, losses.distillation.weight) == (1, 0, 0, 0)
    assert (settings.data["math"].path, settings.data["math"].weight) == ("math.jsonl", 1.0)


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "tune.yaml"
    path.write_text(
        "model: moe\ndata: {a: a.txt}\nlearning_rate: 1e-4\ntokens: 2e6\nbatch: 8\nlength: 100\ntrain: router+projectors\n"
    )
    settings = load_tuning(path).settings
    assert (settings.learning_rate, settings.tokens, settings.total_steps, settings.sequences) == (1e-4, 2_000_000, 2500, 20_000)
    assert settings.train == ("router", "projectors")


def test_the_last_step_may_be_filled_in_part() -> None:
    assert load_tuning({**GOOD, "steps": None, "tokens": 33, "batch": 2, "length": 8}).settings.total_steps == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stepps": 3}, "tune.yaml, line 5: stepps: unknown key, did you mean 'steps'?"),
        ({"steps": None}, "model: say how long to train, with either 'steps' or 'tokens'"),
        ({"tokens": 5}, "line 4: steps: say how long to train, with either 'steps' or 'tokens'"),
        ({"learning_rate": -1.0}, "line 5: learning_rate should be greater than 0, not -1.0"),
        ({"data": {"math": {"pth": "a.txt"}}}, "line 4: data.math.pth: unknown key, did you mean 'path'?"),
        ({"data": {"math": {"weight": 1.0}}}, "line 3: data.math needs either a 'path' or a 'hub' dataset"),
        ({"data": {"math": {"path": "a", "hub": "b/c"}}}, "data.math needs either a 'path' or a 'hub' dataset"),
        ({"data": {}}, "data should not be empty"),
        ({"losses": {"distillation": {"weight": 1.0}}}, "data.math has no teacher: distillation needs one for every source"),
        ({"losses": {"distillation": {"wait": 1.0}}}, "losses.distillation.wait: unknown key, did you mean 'weight'?"),
        ({"losses": {"cross_entropy": 0.0}}, "losses: nothing says what text looks like"),
        (
            {"data": {"math": {"path": "a.jsonl", "teacher": "nowhere"}}},
            "tune.yaml, line 5: data.math.teacher teaches nothing: give losses.distillation a weight, or remove it",
        ),
        (
            {"data": {"math": {"path": "a.jsonl", "split": "train"}}},
            "line 5: data.math.split says what of a 'hub' dataset is read, and this source is a 'path': remove it",
        ),
        (
            {"data": {"math": {"path": "a.jsonl", "subset": "main"}}},
            "line 5: data.math.subset says what of a 'hub' dataset is read, and this source is a 'path': remove it",
        ),
        (
            {"data": {"math": {"path": "a.txt", "field": "body"}}},
            "line 5: data.math.field says where the text is in jsonl and parquet, and this is txt: remove it",
        ),
        (
            {"steps": 1_000_000_000_000},
            "line 4: steps means 8,000,000,000,000 sequences, and a run can have 1,000,000,000: lower it, or batch",
        ),
        (
            {"steps": None, "tokens": 1e13, "length": 2},
            "line 4: tokens means 5,000,000,000,000 sequences, and a run can have 1,000,000,000: lower it, or batch",
        ),
        ({"seed": 2**32}, "line 5: seed should be less than 4294967296, not 4294967296"),
        ({"train": "router + "}, "train[1] should not be empty"),
        ({"opens": [{"step": 10, "train": "all"}]}, "line 6: opens[0].step is 10, which never comes: the last step is 9"),
        ({"accumulation": 3}, "accumulation is 3, which does not divide batch 8"),
        ({"train": []}, "train should not be empty"),
        ({"dtype": "float16"}, "dtype should be 'float32' or 'bfloat16', not 'float16'"),
    ],
)
def test_mistakes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_tuning(write(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_beside_the_file_that_is_no_seed(tmp_path: Path, seed: int) -> None:
    with pytest.raises(InputError, match=f"^the seed should be from 0 to 4294967295, not {seed}$"):
        load_tuning(write(tmp_path, seed=3), seed=seed)
    assert load_tuning(write(tmp_path, seed=3), seed=2**32 - 1).settings.seed == 2**32 - 1


def test_parts_may_have_spaces_between_them() -> None:
    settings = load_tuning({**GOOD, "train": "router + experts.math", "adapters": {"target": "backbone +projectors"}}).settings
    assert settings.train == ("router", "experts.math")
    assert settings.adapters is not None and settings.adapters.target == ("backbone", "projectors")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no tuning file .*none.yaml: check the path"):
        load_tuning(tmp_path / "none.yaml")


def test_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    (tmp_path / "tune.yaml").write_text("- model: moe\n")
    with pytest.raises(InputError, match="should be a mapping with keys such as 'model' and 'data'"):
        load_tuning(tmp_path / "tune.yaml")


def request(**changes: Any) -> TuneConfig:
    return load_tuning({**GOOD, **changes})


TWO = {"WORLD_SIZE": "2", "RANK": "0"}


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "accelerate launch was asked for several processes but started one, as it does on a CPU: use torchrun",
        ),
        ({}, {**TWO, "ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is set, but moerge tune does not shard with FSDP"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "1"}, "does not shard with DeepSpeed"),
        ({"processes": 2}, {}, "processes is 2, but 1 process runs: start it with torchrun --nproc_per_node 2 -m moerge tune"),
        ({"sharding": "fsdp2"}, {}, "sharding is fsdp2, but one process runs, with nothing to share: use torchrun"),
        ({"processes": 1}, TWO, "processes is 1, but 2 processes run"),
        ({"batch": 3}, TWO, "batch is 3, which accumulation 1 times 2 processes do not divide"),
    ],
)
def test_wrong_launches(changes: dict[str, Any], environment: dict[str, str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        check_launch(request(**changes), environment)
    assert message in str(caught.value)


def test_right_launches() -> None:
    assert check_launch(request(), {}) == 1
    assert check_launch(request(processes=2), TWO) == 2
    assert check_launch(request(), {"ACCELERATE_MIXED_PRECISION": "no"}) == 1
