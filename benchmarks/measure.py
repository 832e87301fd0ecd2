"""One run of one case, and the measurements that need no run of mergekit."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agreement import distance
from floor import measure_floor, warm
from processes import Finished, run
from recipes import CASES, Case

import moerge

MOERGE = (sys.executable, "-m", "moerge")
HELP_RUNS, PLAN_RUNS, WARM_RUNS = 10, 5, 3


@dataclass(frozen=True)
class Bench:
    """Where things lie: checkpoints by name, a folder for recipes and results, mergekit's commands."""

    models: Mapping[str, Path]
    scratch: Path
    threads: int
    mergekit: Path | None = None

    def recipe(self, name: str) -> Path:
        return CASES[name].write_recipe(self.scratch / f"{name}.yaml", self.models)

    def moerge(self, name: str, env: Mapping[str, str] | None = None) -> tuple[Finished, dict[str, Any]]:
        """A merge in a fresh process; the output stays."""
        command = [*MOERGE, "merge", self.recipe(name), self._fresh("moerge"), "--json", "--quiet", "--threads", self.threads]
        finished = run(command, env)
        return finished, json.loads(finished.stdout)

    def run_mergekit(self, case: Case, dtype: str = "bfloat16") -> Finished:
        """mergekit's command with its own defaults; the output stays."""
        assert self.mergekit is not None
        config = case.write_mergekit_config(self.scratch / "mergekit.yaml", self.models, dtype)
        return run([self.mergekit / case.mergekit_command, config, self._fresh("mergekit")])

    def _fresh(self, name: str) -> Path:
        """The path of an output that does not exist, with nothing left to be written back."""
        shutil.rmtree(self.scratch / name, ignore_errors=True)
        os.sync()
        return self.scratch / name

    def clear(self) -> None:
        for name in ("moerge", "mergekit"):
            self._fresh(name)


def run_once(bench: Bench, name: str, with_mergekit: bool) -> dict[str, Any]:
    """Floor, moerge, floor, mergekit, each with its inputs in the page cache and nothing waiting to be written."""
    plan = moerge.plan(bench.recipe(name))
    bench.clear()
    warm(plan)
    floors = [measure_floor(plan, bench.scratch / "floor", bench.threads)]
    finished, result = bench.moerge(name)
    bench.clear()
    floors.append(measure_floor(plan, bench.scratch / "floor", bench.threads))
    bench.clear()
    measured = {
        "case": name,
        "input_bytes": plan.input_bytes,
        "output_bytes": plan.output_bytes,
        "floor": [asdict(floor) for floor in floors],
        "moerge": {
            "seconds": finished.seconds,
            "merge_seconds": result["merge_seconds"],
            "publish_seconds": result["publish_seconds"],
            "cpu_seconds": finished.cpu_seconds,
            "peak_anonymous_bytes": finished.peak_anonymous_bytes,
        },
    }
    if with_mergekit:
        other = bench.run_mergekit(CASES[name])
        bench.clear()
        measured["mergekit"] = {
            "seconds": other.seconds,
            "cpu_seconds": other.cpu_seconds,
            "peak_anonymous_bytes": other.peak_anonymous_bytes,
        }
    return measured


def startup(bench: Bench, names: list[str]) -> dict[str, Any]:
    """Wall times of the commands that should answer at once: medians, and the slowest plan of all cases."""
    help_seconds = [run([*MOERGE, "--help"], sample=False).seconds for _ in range(HELP_RUNS)]
    plans = {
        name: statistics.median(run([*MOERGE, "plan", bench.recipe(name)], sample=False).seconds for _ in range(PLAN_RUNS))
        for name in names
    }
    return {"help_seconds": statistics.median(help_seconds), "plan_seconds": plans}


def compilation(bench: Bench, names: list[str]) -> dict[str, dict[str, float]]:
    """Whole-process wall time of a merge whose kernels have to be compiled first, and of later ones."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as cache:
            seconds = [bench.moerge(name, {"NUMBA_CACHE_DIR": cache})[0].seconds for _ in range(1 + WARM_RUNS)]
        found[name] = {"first_seconds": seconds[0], "later_seconds": statistics.median(seconds[1:])}
    bench.clear()
    return found


def agreement(bench: Bench, names: list[str]) -> dict[str, dict[str, float]]:
    """How far our results lie from mergekit's, which is told to compute in float32 as we do."""
    found = {}
    for name in names:
        bench.moerge(name)
        bench.run_mergekit(CASES[name], "float32")
        found[name] = distance(bench.scratch / "moerge", bench.scratch / "mergekit")
    bench.clear()
    return found


def memory(bench: Bench, names: list[str]) -> dict[str, int]:
    """Peak anonymous bytes of one merge for each case."""
    found = {name: bench.moerge(name)[0].peak_anonymous_bytes for name in names}
    bench.clear()
    return found
