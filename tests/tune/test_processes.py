"""Several processes, and processes that are killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tune_models import make_moe, rows, write_tuning

from command import moerge, start
from moerge.learn.watch import Watch
from moerge.tune.run import tune
from tiny import read_values

TUNINGS = ("native", "routed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tunings: a native mixture, and one routed by sequence whose experts often get nothing."""
    found = tmp_path_factory.mktemp("processes")
    for name in TUNINGS:
        (found / name).mkdir()
        make_moe(found / name, by_sequence=name == "routed", top_k=1 if name == "routed" else 2)
        changes: dict[str, Any] = {"losses": {"load_balance": 0.1, "router_z": 0.01}, "steps": 4, "accumulation": 2}
        changes |= {"heldout": {"math": "math.jsonl"}, "evaluate_every": 2, "heldout_sequences": 3}
        changes |= {"train": "router+experts", "opens": [{"step": 3, "train": "backbone"}], "save_every": 3}
        write_tuning(found / name, **changes)
        write_tuning(found / name, "sharded.yaml", **changes, sharding="fsdp2")
        write_tuning(found / name, "adapted.yaml", **{**changes, "opens": None, "train": "router"}, adapters={"rank": 2})
    return found


def start_processes(count: int, code: str, **environment: str) -> list[subprocess.Popen[str]]:
    """As torchrun starts them, without its own seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    whole = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count), **environment}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**whole, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def interrupted(settings: str, out: str) -> None:
    """Stop in the step after the first training checkpoint, and go on."""
    done = [0]

    def advance(tokens: int) -> None:
        done[0] += tokens
        if done[0] == 4 * 64:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(settings, out, watch=Watch(lambda total: advance))
    tune(settings, out, resume=True)


def assert_alike(one: list[dict[str, Any]], two: list[dict[str, Any]], what: str) -> None:
    assert len(one) == len(two) == 5
    for mine, theirs in zip(one, two, strict=True):
        assert mine.get("heldout", {}) == pytest.approx(theirs.get("heldout", {}), rel=2e-6), what
        if mine["step"] == 0:
            continue
        assert mine["drawn"] == theirs["drawn"] and mine["load"] == theirs["load"], what
        for key in ("loss", "cross_entropy", "load_balance", "router_z", "router_entropy", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-6), (what, mine["step"], key)


def test_two_processes_have_the_losses_of_one(folder: Path) -> None:
    """Half the choices of a batch are one process's; an expert that nobody chose there must not stop the other.

    The same with adapters, and with each parameter shared out (FSDP2), interrupted and continued. At the end comes a mistake,
    which is said once.
    """
    bad = write_tuning(folder / "native", "bad.yaml", train="projectors")
    code = "\n".join(
        [
            "import sys",
            "from moerge.cli import main",
            "from moerge.tune.run import tune",
            "from test_processes import interrupted",
            *(f"tune({str(folder / name / 'tune.yaml')!r}, {str(folder / name / 'two')!r})" for name in TUNINGS),
            f"tune({str(folder / 'routed' / 'adapted.yaml')!r}, {str(folder / 'routed' / 'adapted')!r})",
            *(f"interrupted({str(folder / name / 'sharded.yaml')!r}, {str(folder / name / 'sharded')!r})" for name in TUNINGS),
            f"sys.argv = ['moerge', 'tune', {str(bad)!r}, {str(folder / 'never')!r}]",
            "main()",
        ]
    )
    here = Path(__file__).parent
    processes = start_processes(2, code, PYTHONPATH=os.pathsep.join((str(here.parent), str(here))))
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert "train: the model has no projectors" in said[0] and said[1] == ""
    assert not (folder / "never").exists() and not (folder / ".never.moerge-tuning").exists()
    idle = 0
    for name in TUNINGS:
        result = tune(folder / name / "tune.yaml", folder / name / "one")
        assert result is not None
        one = rows(folder / name / "one")
        idle += sum(0.0 in row["load"][0] for row in one[1:])
        for other in ("two", "sharded"):
            assert_alike(one, rows(folder / name / other), f"{name}, {other}")
        weights = [read_values(folder / name / out) for out in ("one", "two", "sharded")]
        for tensor, values in weights[0].items():
            for theirs in weights[1:]:
                np.testing.assert_allclose(values, theirs[tensor], rtol=0, atol=1e-6, err_msg=tensor)
    tune(folder / "routed" / "adapted.yaml", folder / "routed" / "adapted-one")
    assert_alike(rows(folder / "routed" / "adapted-one"), rows(folder / "routed" / "adapted"), "adapted")
    assert idle, "no expert was idle: the test does not show what it should"


def test_a_killed_tuning_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    changes: dict[str, Any] = {"steps": 60, "save_every": 2, "batch": 2, "length": 8, "schedule": "linear"}
    path, out = write_tuning(folder / "native", "long.yaml", **changes), folder / "killed"
    process = start("tune", path, out, "--quiet")
    checkpoints, metrics = folder / ".killed.moerge-tuning" / "checkpoints", folder / ".killed.moerge-tuning" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("*/complete")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    before = metrics.read_text().splitlines()
    assert 2 <= len(before) < 58
    complete = max(int(mark.parent.name.rpartition("-")[2]) for mark in checkpoints.glob("*/complete"))
    assert len(before) - complete <= 3  # at most the steps since the last checkpoint, and the one that was under way
    short = {**changes, "steps": complete + 2}
    assert "had another steps" in moerge("tune", write_tuning(folder / "native", "short.yaml", **short), out, "--resume").err
    done = moerge("tune", path, out, "--resume", "--json").json
    assert done["resumed_after_step"] == complete
    rows_after = rows(out)
    assert [row["step"] for row in rows_after] == list(range(1, 61))
    moerge("tune", path, folder / "whole", "--quiet")
    assert rows_after == rows(folder / "whole")
