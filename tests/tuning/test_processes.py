"""Several processes, and processes that are killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from moerge.tuning.run import tune
from tests.helpers.command import moerge, start
from tests.helpers.recorded import Recorded
from tests.tuning.tune_models import make_moe, rows, write_tuning

pytestmark = pytest.mark.slow

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
        adapted = {**changes, "train": "router", "opens": [{"step": 3, "train": "*norm*"}], "adapters": {"rank": 2}}
        write_tuning(found / name, "adapted.yaml", **adapted)
        write_tuning(found / name, "sharded-adapted.yaml", **adapted, sharding="fsdp2")
    alone = {**changes, "train": None, "opens": None, "adapters": {"rank": 2, "save": "adapter"}}
    single = {**changes, "train": "experts.math", "opens": [{"step": 3, "train": "experts.code"}], "weight_decay": 0.5}
    for name, settings in (("alone", alone), ("single", single)):
        write_tuning(found / "native", f"{name}.yaml", **settings)
        write_tuning(found / "native", f"sharded-{name}.yaml", **settings, sharding="fsdp2")
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

    def stop(tokens: int) -> None:
        if progress.done["tokens"] == 4 * 64:
            raise KeyboardInterrupt

    progress = Recorded(stop)
    with pytest.raises(KeyboardInterrupt):
        tune(settings, out, progress=progress)
    tune(settings, out, resume=True)


def stored(folder: Path) -> dict[str, np.ndarray]:
    """The values of a checkpoint or of an adapter."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_alike(one: list[dict[str, Any]], two: list[dict[str, Any]], what: str) -> None:
    assert len(one) == len(two) == 5
    for mine, theirs in zip(one, two, strict=True):
        assert mine.get("heldout", {}) == pytest.approx(theirs.get("heldout", {}), rel=2e-6), what
        if mine["step"] == 0:
            continue
        assert mine["drawn"] == theirs["drawn"] and mine["load"] == theirs["load"], what
        for key in ("loss", "cross_entropy", "load_balance", "router_z", "router_entropy", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-6), (what, mine["step"], key)


def as_two_processes(code: str) -> list[str]:
    """What each wrote to stderr; the code ends in a mistake."""
    processes = start_processes(2, code, PYTHONPATH=str(Path(__file__).parents[2]))
    said = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    return said


def test_two_processes_have_the_losses_of_one(folder: Path) -> None:
    """Half the choices of a batch are one process's; an expert that nobody chose there must not stop the other.

    The same with adapters, with a single expert, and with each parameter shared out (FSDP2), interrupted and continued. At the
    end comes a mistake, which is said once.
    """
    bad = write_tuning(folder / "native", "bad.yaml", train="projectors")
    whole = ["native/tune", "routed/tune", "routed/adapted"]
    shared = [f"{name}/sharded{of}" for name in TUNINGS for of in ("", "-adapted")]
    shared += ["native/sharded-alone", "native/sharded-single"]
    code = [
        "import sys",
        "from moerge.cli import main",
        "from moerge.tuning.run import tune",
        "from tests.tuning.test_processes import interrupted",
        *(f"tune({str(folder / name) + '.yaml'!r}, {str(folder / name) + '-two'!r})" for name in whole),
        *(f"interrupted({str(folder / name) + '.yaml'!r}, {str(folder / name) + '-two'!r})" for name in shared),
        f"sys.argv = ['moerge', 'tune', {str(bad)!r}, {str(folder / 'never')!r}]",
        "main()",
    ]
    said = as_two_processes("\n".join(code))
    assert "train: the model has no projectors" in said[0] and said[1] == ""
    assert not (folder / "never").exists() and not (folder / ".never.moerge-tuning").exists()
    idle = 0
    for of_two in (*whole, *shared):
        name = of_two.replace("sharded-", "").replace("sharded", "tune")
        one, two = folder / f"{name}-one", folder / f"{of_two}-two"
        if not one.exists():
            tune(folder / f"{name}.yaml", one)
        assert_alike(rows(one), rows(two), of_two)
        idle += sum(0.0 in row["load"][0] for row in rows(one)[1:])
        theirs = stored(two)
        for tensor, values in stored(one).items():
            np.testing.assert_allclose(values, theirs.pop(tensor), rtol=0, atol=1e-6, err_msg=f"{of_two}, {tensor}")
        assert not theirs
    assert idle, "no expert was idle: the test does not show what it should"
    before = stored(folder / "native" / "moe")
    for tensor, values in stored(folder / "native" / "sharded-single-two").items():
        assert np.array_equal(values, before[tensor]) != bool(re.search(r"experts\.[12]\.", tensor)), tensor


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
