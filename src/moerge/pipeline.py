"""The whole flow, from a recipe to a checkpoint: read this first.

recipe.yaml -> load_recipe -> build_plan -> Execution.run into a Staging folder -> fit_outputs -> publish
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moerge.checkpoint.card import model_card
from moerge.checkpoint.digest import file_digest
from moerge.checkpoint.manifest import build_manifest, to_json
from moerge.checkpoint.staging import MANIFEST, Staging, Start, assign_shards, being_written, busy, interrupted
from moerge.clients import check_plan
from moerge.errors import InputError, MachineError
from moerge.files import check_target_name
from moerge.moe.fitting import Calibrating, fit_outputs
from moerge.planning.build import build_plan
from moerge.planning.execute import Execution
from moerge.planning.integers import unlike_integers
from moerge.planning.plan import Plan
from moerge.recipe import Recipe, load_recipe
from moerge.statistics.binding import differing

SHARD_BYTES = 5_000_000_000
"""Largest shard by default, as transformers writes them."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MergeResult:
    """A finished merge. Times are in seconds; `publish_seconds` is spent making the files durable and naming them."""

    folder: Path
    plan: Plan
    threads: int
    merge_seconds: float
    publish_seconds: float
    nonfinite_inputs: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "checkpoint": str(self.folder),
            "merge_seconds": round(self.merge_seconds, 3),
            "publish_seconds": round(self.publish_seconds, 3),
            "threads": self.threads,
            "nonfinite_inputs": list(self.nonfinite_inputs),
            **self.plan.summary(self.threads),
        }


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, *, seed: int | None = None, clients: Sequence[str] = ()) -> Plan:
    """What a recipe amounts to, without reading a tensor; Hub models' weights are not downloaded.

    `recipe` is a YAML file's path or the same structure as a dict, whose relative paths start from the working directory.
    `seed` replaces the recipe's seeds. `clients` are programs that are to run the result, such as "llama.cpp" (see
    `moerge.clients`): what they will do differently is among the plan's warnings. Raises InputError if the recipe or a model is
    at fault, or if one of the clients cannot run the result.
    """
    return check_plan(build_plan(load_recipe(recipe, seed=seed)), clients)


def merge(
    plan: Plan | str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    threads: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    allow_nonfinite: bool = False,
    progress: Callable[[Plan], Progress] | None = None,
    calibrating: Calibrating | None = None,
    clients: Sequence[str] = (),
) -> MergeResult:
    """Carry out a plan (or a recipe) and write the checkpoint folder `out`.

    `resume` continues an interrupted merge into `out`; `force` replaces a checkpoint that moerge made there before.
    The result does not depend on `threads` (default: the cores available), and its tensors not on `max_shard_bytes`.
    `progress` is called with the plan once work starts and returns what is told the bytes done, from any thread; `calibrating`,
    with a number and "texts" or "tokens" once something is computed from as many of them, and returns what is told those done.
    `clients` are as in `plan`, asked before anything is written; the files do not depend on them.
    Raises InputError for bad input and an existing `out`, MachineError for a full or failing disk.
    """
    plan = plan if isinstance(plan, Plan) else build_plan(load_recipe(plan))
    check_plan(plan, clients)
    target = Path(os.path.abspath(out))
    start = check_target(plan, target, resume=resume, force=force)
    if not plan.complete:  # only now, since a download may take hours
        plan = build_plan(plan.recipe, weights=True, commits={model.name: model.revision for model in plan.models})
    for fitting in plan.fittings:
        fitting.fitter.require()
    threads = threads or default_threads()
    shards = assign_shards(plan.outputs, max_shard_bytes)
    begun = time.perf_counter()
    fingerprint = f"{plan.fingerprint}-{max_shard_bytes}-{allow_nonfinite}-{version('moerge')}"
    with Staging(target, shards, fingerprint, start) as staging:
        execution = Execution(staging, allow_nonfinite)
        if progress is not None:
            execution.advance = progress(plan)
        execution.run(plan.outputs, threads)
        remarks = fit_outputs(plan, staging, partial(_files, plan), threads, calibrating)
        remarks = (*remarks, *differing(plan.statistics, plan.outputs, staging.inputs), *unlike_integers(plan))
        if remarks:
            plan = replace(plan, warnings=(*plan.warnings, *remarks))
        merged = time.perf_counter()
        staging.publish(_with_manifest(plan, staging), replace=force)
    return MergeResult(
        target, check_plan(plan, clients), threads, merged - begun, time.perf_counter() - merged, tuple(staging.nonfinite)
    )


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _files(plan: Plan) -> dict[str, bytes]:
    return {**plan.files, "config.json": to_json(plan.config), "README.md": model_card(plan).encode()}


def _with_manifest(plan: Plan, staging: Staging) -> dict[str, bytes]:
    files = _files(plan)
    digests = {name: file_digest(content) for name, content in sorted(files.items())}
    return {**files, MANIFEST: to_json(build_manifest(plan, staging, digests))}


def check_target(plan: Plan, target: Path, *, resume: bool, force: bool) -> Start:
    """How writing to `target` begins; InputError if it must not, MachineError if the disk is too full."""
    check_target_name(target)
    real, left = target.resolve(), interrupted(target)
    for name, source in [(model.name, folder.resolve()) for model in plan.models for folder in model.folders]:
        if real == source or source in real.parents:
            raise InputError(f"the output {target} lies in {name}'s own folder: choose another one")
        if real in source.parents and target.exists():
            raise InputError(f"{name} lies in the output {target} and would be replaced with it: choose another output")
    if being_written(target):
        raise InputError(busy(target))
    if target.exists() and not force:
        raise InputError(f"{target} already exists: choose another folder, or replace it with --force")
    if target.exists() and not (target / MANIFEST).exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is not a checkpoint that moerge made, so --force does not replace it: remove it yourself")
    if left and not (resume or force):
        raise InputError(f"an interrupted merge into {target} lies there: continue it with --resume, or start over with --force")
    _check_space(plan, target, staged=left and resume)
    return "resume" if resume and left else "restart" if left else "new"


def _check_space(plan: Plan, target: Path, *, staged: bool) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if not staged and free < plan.output_bytes:
        raise MachineError(
            f"no space for {target}: it needs {plan.output_bytes / 1e9:.1f} GB, {parent} has {free / 1e9:.1f} GB free"
        )
