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

import pytest
from tune_models import make_moe, rows, write_tuning

from command import moerge, start
from moerge.tune.run import tune

TUNINGS = ("native", "routed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tunings: a native mixture, and one routed by sequence whose experts often get nothing."""
    found = tmp_path_factory.mktemp("processes")
    for name in TUNINGS:
        (found / name).mkdir()
        make_moe(found / name, by_sequence=name == "routed", top_k=1 if name == "routed" else 2)
        write_tuning(found / name, losses={"load_balance": 0.1, "router_z": 0.01}, steps=4, accumulation=2, save_every=3)
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


def test_two_processes_have_the_losses_of_one(folder: Path) -> None:
    """Half the choices of a batch are one process's; an expert that nobody chose there must not stop the other."""
    code = "\n".join(
        [
            "from moerge.tune.run import tune",
            *(f"tune({str(folder / name / 'tune.yaml')!r}, {str(folder / name / 'two')!r})" for name in TUNINGS),
        ]
    )
    processes = start_processes(2, code)
    for process in processes:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    idle = 0
    for name in TUNINGS:
        result = tune(folder / name / "tune.yaml", folder / name / "one")
        assert result is not None
        one, two = rows(folder / name / "one"), rows(folder / name / "two")
        assert len(one) == len(two) == 4
        for mine, theirs in zip(one, two, strict=True):
            assert mine["drawn"] == theirs["drawn"] and mine["load"] == theirs["load"]
            for key in ("loss", "cross_entropy", "load_balance", "router_z", "router_entropy", "grad_norm"):
                assert mine[key] == pytest.approx(theirs[key], rel=2e-6), (name, mine["step"], key)
            idle += 0.0 in mine["load"][0]
    assert idle, "no expert was idle: the test does not show what it should"


def test_a_mistake_is_said_once(folder: Path) -> None:
    path = write_tuning(folder / "native", "bad.yaml", train="projectors")
    code = f"import sys; sys.argv = ['moerge', 'tune', {str(path)!r}, {str(folder / 'never')!r}]; from moerge.cli import main; main()"
    processes = start_processes(2, code)
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "train: the model has no projectors" in said[0] and said[1] == ""
    assert not (folder / "never").exists() and not (folder / ".never.moerge-tuning").exists()


def test_a_killed_tuning_goes_on_as_if_nothing_had_happened(folder: Path) -> None:
    changes: dict[str, Any] = {"steps": 400, "save_every": 2, "batch": 2, "length": 8, "schedule": "linear"}
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
    assert 2 <= len(before) < 390
    complete = max(int(mark.parent.name.rpartition("-")[2]) for mark in checkpoints.glob("*/complete"))
    assert len(before) - complete <= 3  # at most the steps since the last checkpoint, and the one that was under way
    short = {**changes, "steps": complete + 2}
    assert "had another steps" in moerge("tune", write_tuning(folder / "native", "short.yaml", **short), out, "--resume").err
    done = moerge("tune", path, out, "--resume", "--json").json
    assert done["resumed_after_step"] == complete
    rows_after = rows(out)
    assert [row["step"] for row in rows_after] == list(range(1, 401))
    moerge("tune", path, folder / "whole", "--quiet")
    assert rows_after == rows(folder / "whole")
