"""Crashes and signals at any moment: --resume then gives the same bytes as a run that nothing disturbed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moerge import system
from moerge.checkpoint.staging import JOURNAL, Staging, staging_folder
from moerge.merging.pipeline import merge
from tests.helpers.command import moerge
from tests.helpers.tiny import edit_config, llama_config, llama_tensors, make_models, write_checkpoint, write_recipe

pytestmark = pytest.mark.slow

DENSE = {"merge": {"method": "ties", "scope": "model", "overrides": [{"match": "attention", "method": "dare"}]}}
MOE = {"merge": {"method": "linear"}, "moe": {"router": {"seed": 3}}}
SHARD = 6000


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies does not lose what it wrote, so these tests need no fsync, which takes most of their time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Crash(BaseException):
    """Not an Exception, so that nothing but the interpreter's own clean-up sees it."""


@contextmanager
def crashing(after: int) -> Iterator[list[str]]:
    """Crash at the `after`-th call that changes the disk, and at all later ones; yields the calls made so far."""
    calls: list[str] = []

    def breaking(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(name)
            if len(calls) > after:
                raise Crash(name)
            return real(*arguments, **keywords)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("pwrite", "posix_fallocate", "fsync", "rename", "unlink", "mkdir", "rmdir"):
            patch.setattr(os, name, breaking(name, getattr(os, name)))
        patch.setattr(system, "exchange", breaking("exchange", system.exchange))
        patch.setattr(Staging, "_append", breaking("journal", Staging._append))
        yield calls


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun(out: Path) -> Path:
    """Where an interrupted run has left its files."""
    return staging_folder(out) / "checkpoint"


def crash(recipe: Path, out: Path, after: int, **options: Any) -> list[str]:
    """Run until the crash; the calls that were made, fewer than `after` if the run came to its end."""
    with crashing(after) as calls:
        try:
            merge(recipe, out, threads=1, max_shard_bytes=SHARD, **options)
        except Crash:
            return calls[:-1]
    return calls


@pytest.mark.parametrize(
    ("sections", "step"),
    [(DENSE, 1), (MOE, 4), ({"merge": {"method": "della"}}, 9), ({"merge": {"method": "tsv_m"}}, 9)],
    ids=["dense", "moe", "rows", "whole tensors"],
)
def test_a_crash_at_every_write(tmp_path: Path, sections: dict[str, Any], step: int) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, **sections)
    everything = crash(recipe, tmp_path / "expected", after=10**9)
    expected = snapshot(tmp_path / "expected")
    assert everything.count("pwrite") > 20 and everything.count("rename") == 1
    out = tmp_path / "out"
    for after in range(0, len(everything), step):
        crash(recipe, out, after)
        if out.exists():  # the crash came after the folder got its name
            assert snapshot(out) == expected
            shutil.rmtree(out)
            shutil.rmtree(staging_folder(out), ignore_errors=True)
            continue
        merge(recipe, out, threads=2, max_shard_bytes=SHARD, resume=True)
        assert snapshot(out) == expected, f"crashed after {after} calls ({everything[: after + 1][-1]})"
        assert not staging_folder(out).exists()
        shutil.rmtree(out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "math", "code", "knowledge", "recipe.yaml", "expected"}


@pytest.mark.parametrize("swaps", [True, False], ids=["swapping", "two renames"])
def test_what_has_the_targets_name_is_complete_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool
) -> None:
    """Also while --force replaces an older checkpoint; there is always one where folders can be swapped."""
    make_models(tmp_path)
    if not swaps:
        monkeypatch.setattr(system, "exchange", lambda one, other: False)
    elif not can_swap(tmp_path):
        pytest.skip("this file system cannot swap two folders")
    old, new = write_recipe(tmp_path, "old.yaml"), write_recipe(tmp_path, "new.yaml", **DENSE)
    merge(old, tmp_path / "before", max_shard_bytes=SHARD)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    everything = crash(new, tmp_path / "after", after=10**9, force=True)
    before, after = snapshot(tmp_path / "before"), snapshot(tmp_path / "after")
    out = tmp_path / "out"
    seen = []
    for count in [*range(0, len(everything), 7), *range(len(everything) - 30, len(everything) + 2)]:
        shutil.copytree(tmp_path / "before", out)
        crash(new, out, count, force=True)
        found = snapshot(out) if out.exists() else None
        assert found in (None, before, after), f"after {count} calls"
        seen.append("nothing" if found is None else "before" if found == before else "after")
        if found != after or count % 2:
            merge(new, out, max_shard_bytes=SHARD, resume=True, force=True)
            assert snapshot(out) == after
            assert not staging_folder(out).exists()
        shutil.rmtree(out)
        shutil.rmtree(staging_folder(out), ignore_errors=True)
    assert list(dict.fromkeys(seen[-32:])) == (["before", "after"] if swaps else ["before", "nothing", "after"])


def can_swap(folder: Path) -> bool:
    for name in ("one", "other"):
        (folder / name).mkdir()
    (folder / "one" / "mark").touch()
    able = system.exchange(folder / "one", folder / "other")
    assert (folder / "other" / "mark").exists() == able
    for name in ("one", "other"):
        shutil.rmtree(folder / name)
    return able


def test_a_run_killed_after_the_rename_leaves_nothing_in_the_folder(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    calls = crash(recipe, tmp_path / "expected", after=10**9)
    crash(recipe, out, after=calls.index("rename") + 1)
    assert snapshot(out) == snapshot(tmp_path / "expected")
    assert [path.name for path in staging_folder(out).iterdir()] == [JOURNAL]
    assert "already exists" in moerge("merge", recipe, out, "--max-shard-size", f"{SHARD}B").err
    resumed = moerge("merge", recipe, out, *OPTIONS, "--resume")
    assert (resumed.code, resumed.err) == (0, "") and "is complete already" in " ".join(resumed.out.split())
    assert snapshot(out) == snapshot(tmp_path / "expected") and not staging_folder(out).exists()
    assert moerge("merge", recipe, out, *OPTIONS, "--resume", "--json").json["was_complete"] is True
    shutil.rmtree(out)
    crash(recipe, out, after=calls.index("rename") + 1)
    shutil.rmtree(out)
    merge(recipe, out, max_shard_bytes=SHARD)  # nothing is left to resume, so it is not asked for
    assert snapshot(out) == snapshot(tmp_path / "expected")
    assert not staging_folder(out).exists()


def test_force_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path)
    merge(recipe, tmp_path / "elsewhere")
    before = snapshot(tmp_path / "elsewhere")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    merge(write_recipe(tmp_path, **DENSE), tmp_path / "out", force=True)
    assert snapshot(tmp_path / "elsewhere") == before != snapshot(tmp_path / "out")
    assert not staging_folder(tmp_path / "out").exists()


def _replace(path: Path) -> None:
    """Another file of the same name, size and time, as `rsync --times` or `cp -p` leave it."""
    beside = path.with_name("new")
    shutil.copy2(path, beside)
    os.replace(beside, path)


@pytest.mark.parametrize("change", ["recipe", "seed", "input", "shard size", "file", "shard", "header"])
def test_a_complete_result_of_something_else_is_not_taken_for_this_ones(tmp_path: Path, change: str) -> None:
    make_models(tmp_path)
    recipe, out = write_recipe(tmp_path, **DENSE), tmp_path / "out"
    merge(recipe, out, max_shard_bytes=SHARD)
    options = {"seed": (*OPTIONS, "--seed", "1"), "shard size": ()}.get(change, OPTIONS)
    if change == "recipe":
        recipe = write_recipe(tmp_path, "other.yaml", merge={**DENSE["merge"], "scale": 0.5})
    elif change == "input":
        write_checkpoint(tmp_path / "code", llama_tensors(llama_config(), expert=9))
    elif change == "file":
        edit_config(out, rope_theta=5.0)
    elif change == "shard":
        next(out.glob("*.safetensors")).unlink()
    elif change == "header":
        next(out.glob("*.safetensors")).write_bytes(b"{}")
    result = moerge("merge", recipe, out, *options, "--resume")
    assert (result.code, "already exists" in result.err) == (2, True)


def test_a_link_to_an_empty_folder_is_that_folder(tmp_path: Path) -> None:
    """Perhaps on another disk, to which its owner wants the result to go."""
    make_models(tmp_path)
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "place")
    recipe = write_recipe(tmp_path)
    assert moerge("merge", recipe, tmp_path / "out").code == 2
    assert moerge("merge", recipe, tmp_path / "out", "--force").code == 0
    assert (tmp_path / "out").is_symlink()
    assert {path.name for path in (tmp_path / "disk").iterdir()} == {"place"}
    assert (tmp_path / "disk" / "place" / "moerge.json").exists()


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Path, Path, dict[str, bytes]]:
    """A recipe, a target with an interrupted run in which most tensors are done, and what should come out."""
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, **DENSE)
    everything = crash(recipe, tmp_path / "expected", after=10**9)
    out = tmp_path / "out"
    crash(recipe, out, after=len(everything) * 6 // 10)
    assert len((staging_folder(out) / JOURNAL).read_text().splitlines()) > 10
    return recipe, out, snapshot(tmp_path / "expected")


OPTIONS = ("--max-shard-size", f"{SHARD}B")


def _resume(interrupted: tuple[Path, Path, dict[str, bytes]]) -> set[str]:
    """Resume, compare, and return which tensors were written."""
    recipe, out, expected = interrupted
    written: set[str] = set()
    real = Staging.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "write", lambda self, o, *rest: (written.add(o.name), real(self, o, *rest))[1])
        result = moerge("merge", recipe, out, *OPTIONS, "--resume")
    assert result.code == 0, result.err
    assert snapshot(out) == expected
    return written


def _journalled(out: Path) -> list[str]:
    return [json.loads(line)["tensor"] for line in (staging_folder(out) / JOURNAL).read_text().splitlines()[1:]]


def test_what_was_done_is_not_done_again(interrupted: tuple[Path, Path, dict[str, bytes]]) -> None:
    done = set(_journalled(interrupted[1]))
    everything = set(llama_tensors(llama_config()))
    assert _resume(interrupted) == everything - done


def test_without_resume_an_interrupted_run_is_not_touched(interrupted: tuple[Path, Path, dict[str, bytes]]) -> None:
    recipe, out, _ = interrupted
    before = snapshot(staging_folder(out))
    result = moerge("merge", recipe, out, *OPTIONS)
    assert result.code == 2
    assert result.err == (
        f"moerge: an interrupted merge into {out} lies there: continue it with --resume, or start over with --force\n"
    )
    assert snapshot(staging_folder(out)) == before
    _resume(interrupted)


def test_resume_where_nothing_was_begun_is_an_ordinary_run(tmp_path: Path) -> None:
    make_models(tmp_path)
    assert moerge("merge", write_recipe(tmp_path), tmp_path / "out", "--resume").code == 0


def test_force_starts_over(interrupted: tuple[Path, Path, dict[str, bytes]]) -> None:
    recipe, out, expected = interrupted
    (begun(out) / "leftover.safetensors").write_bytes(b"x")
    assert moerge("merge", recipe, out, *OPTIONS, "--force").code == 0
    assert snapshot(out) == expected


@pytest.mark.parametrize("damage", ["half a line", "garbage", "zeros", "no line at all", "half the first line"])
def test_a_damaged_journal(interrupted: tuple[Path, Path, dict[str, bytes]], damage: str) -> None:
    journal = staging_folder(interrupted[1]) / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    kept = len(lines) - 1 if damage in ("half a line", "garbage", "zeros") else 0
    tail = {"half a line": lines[-1][:-20], "garbage": b"{]", "zeros": b"\0" * 64, "half the first line": lines[0][:9]}
    journal.write_bytes(b"".join(lines[:kept]) + tail.get(damage, b""))
    done = {json.loads(line)["tensor"] for line in lines[1:kept]}
    (begun(interrupted[1]) / "model-00009-of-00009.safetensors").write_bytes(b"from another run")
    assert _resume(interrupted) == set(llama_tensors(llama_config())) - done


def test_a_damaged_tensor_is_computed_again(interrupted: tuple[Path, Path, dict[str, bytes]]) -> None:
    from moerge.checkpoint.header import read_header

    out = interrupted[1]
    done = _journalled(out)
    victim = done[3]
    for path in begun(out).glob("*.safetensors"):
        tensor = read_header(path).get(victim)
        if tensor is not None:
            with open(path, "r+b") as file:
                file.seek(tensor.offset + 5)
                file.write(bytes([file.read(1)[0] ^ 1]))
                file.seek(tensor.offset + 5)
    with open(next(begun(out).glob("*.safetensors")), "r+b") as file:
        file.write(b"\0" * 8)  # a damaged header is simply written again
    assert victim in _resume(interrupted)


def test_a_missing_or_short_shard_is_computed_again(interrupted: tuple[Path, Path, dict[str, bytes]]) -> None:
    first, second, *_ = sorted(begun(interrupted[1]).glob("*.safetensors"))
    first.unlink()
    os.truncate(second, 100)
    _resume(interrupted)


@pytest.mark.parametrize("change", ["recipe", "seed", "input", "input as old", "shard size", "dtype", "allow nonfinite"])
def test_another_run_does_not_resume(interrupted: tuple[Path, Path, dict[str, bytes]], tmp_path: Path, change: str) -> None:
    recipe, out, _ = interrupted
    options = {
        "shard size": ("--max-shard-size", "1MB"),
        "seed": (*OPTIONS, "--seed", "1"),
        "allow nonfinite": (*OPTIONS, "--allow-nonfinite"),
    }.get(change, OPTIONS)
    if change == "recipe":
        recipe = write_recipe(tmp_path, "other.yaml", merge={**DENSE["merge"], "scale": 0.5})
    elif change == "dtype":
        recipe = write_recipe(tmp_path, "other.yaml", dtype="float16", **DENSE)
    elif change == "input":
        write_checkpoint(tmp_path / "code", llama_tensors(llama_config(), expert=9))
    elif change == "input as old":
        _replace(next((tmp_path / "code").glob("*.safetensors")))
    before = snapshot(staging_folder(out))
    result = moerge("merge", recipe, out, *options, "--resume")
    assert result.code == 2
    assert result.err == (
        f"moerge: the interrupted run in {staging_folder(out)} had another recipe, other inputs or options: "
        "run it as it was, or start over with --force\n"
    )
    assert not out.exists()
    assert snapshot(staging_folder(out)) == before


def test_a_changed_config_does_not_resume(interrupted: tuple[Path, Path, dict[str, bytes]], tmp_path: Path) -> None:
    recipe, out, _ = interrupted
    for name in ("base", "math", "code", "knowledge"):
        edit_config(tmp_path / name, rope_theta=5e5)
    assert "had another recipe, other inputs or options" in moerge("merge", recipe, out, *OPTIONS, "--resume").err


def test_a_resumed_run_remembers_what_was_not_finite(tmp_path: Path) -> None:
    models = make_models(tmp_path)
    tensors = llama_tensors(llama_config(), expert=1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name][0, 0] = np.nan
    write_checkpoint(models["code"], tensors)
    recipe = write_recipe(tmp_path)
    everything = crash(recipe, tmp_path / "expected", after=10**9, allow_nonfinite=True)
    crash(recipe, tmp_path / "out", len(everything) // 2, allow_nonfinite=True)
    merge(recipe, tmp_path / "out", max_shard_bytes=SHARD, resume=True, allow_nonfinite=True)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    manifest = json.loads((tmp_path / "out" / "moerge.json").read_text())
    assert manifest["nonfinite_inputs"] == ["code:lm_head.weight", "code:model.embed_tokens.weight"]


SLOW = """
import os, sys, time
write = os.pwrite
def slow(descriptor, data, offset):
    half = len(data) // 2
    written = write(descriptor, data[:half], offset)
    time.sleep({pause})
    return written + write(descriptor, data[half:], offset + written)
os.pwrite = slow
from moerge.cli import main
main()
"""


def start_slowly(pause: float, *arguments: object) -> subprocess.Popen[str]:
    """`moerge` with writes in two halves and a pause between them, once it has begun to write."""
    out = Path(str(arguments[2]))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW.format(pause=pause), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (staging_folder(out) / JOURNAL).exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_signals_at_random_moments(tmp_path: Path, number: signal.Signals) -> None:
    make_models(tmp_path)
    recipe = write_recipe(tmp_path, **DENSE)
    merge(recipe, tmp_path / "expected", max_shard_bytes=SHARD)
    expected, out = snapshot(tmp_path / "expected"), tmp_path / "out"
    moments = random.Random(number)
    for _ in range(3):
        process = start_slowly(0.02, "merge", recipe, out, *OPTIONS, "--threads", 1)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
        if process.returncode != 0:
            assert not out.exists()
            assert stdout == ""
            if number == signal.SIGKILL:
                assert process.returncode == -signal.SIGKILL
            else:
                assert process.returncode == 130
                assert stderr == "moerge: interrupted; continue with the same command and --resume\n"
            assert moerge("merge", recipe, out, *OPTIONS, "--resume").code == 0
        assert snapshot(out) == expected
        shutil.rmtree(out)


def test_two_processes_do_not_write_the_same_target(tmp_path: Path) -> None:
    make_models(tmp_path)
    recipe, out = write_recipe(tmp_path), tmp_path / "out"
    first = start_slowly(0.05, "merge", recipe, out)
    for options in ((), ("--resume",), ("--force",)):
        second = moerge("merge", recipe, out, *options)
        assert second.code == 2
        assert second.err == f"moerge: another moerge is writing {out} right now: wait for it, or choose another folder\n"
    assert first.poll() is None
    first.communicate(timeout=60)
    assert first.returncode == 0
    merge(recipe, tmp_path / "expected")
    assert snapshot(out) == snapshot(tmp_path / "expected")
