"""The whole flow, from a recipe to a checkpoint: read this first.

recipe.yaml -> load_recipe -> build_plan -> Executor.run into a Staging folder -> fit_outputs -> publish
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moerge.checkpoint.manifest import damaged_files, read_manifest, sealed, to_json
from moerge.checkpoint.reader import open_folder
from moerge.checkpoint.staging import MANIFEST, Staging, Start, assign_shards, workspace
from moerge.checkpoint.state_dict import is_state_dict, open_state_dict, stem_of
from moerge.clients import check_plan
from moerge.errors import InputError, MachineError
from moerge.execution.executor import Executor
from moerge.execution.float8 import Float8Store
from moerge.files import check_target, check_unchanged, target_of
from moerge.formatting import Displayed, as_size, as_time
from moerge.merging.card import model_card
from moerge.merging.fitting import fit_outputs
from moerge.merging.integers import unlike_integers
from moerge.merging.manifest import build_manifest
from moerge.planning.build import build_plan
from moerge.planning.plan import Plan
from moerge.planning.statistics import differing
from moerge.progress import Progress, reporter
from moerge.recipe import Recipe, load_recipe
from moerge.tensors.digest import file_digest
from moerge.tensors.spec import TensorSpec
from moerge.tensors.threads import default_threads

SHARD_BYTES = 5_000_000_000
"""Largest shard by default, as transformers writes them."""


@dataclass(frozen=True, repr=False)
class MergeResult(Displayed):
    """A finished merge. Times are in seconds; `publish_seconds` is spent making the files durable and naming them.

    `was_complete`: there was nothing left to resume, and nothing was done.
    """

    folder: Path
    plan: Plan
    threads: int
    merge_seconds: float
    publish_seconds: float
    nonfinite_inputs: tuple[str, ...]
    was_complete: bool = False

    def headline(self) -> str:
        """The folder, and how long it took."""
        return f"{self.folder}, {self.plan.headline()}, {as_time(self.merge_seconds + self.publish_seconds)}"

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "checkpoint": str(self.folder),
            "merge_seconds": round(self.merge_seconds, 3),
            "publish_seconds": round(self.publish_seconds, 3),
            "threads": self.threads,
            "nonfinite_inputs": list(self.nonfinite_inputs),
            "was_complete": self.was_complete,
            **self.plan.summary(self.threads),
        }


def plan(recipe: str | Path | Mapping[str, Any] | Recipe, *, seed: int | None = None, clients: Sequence[str] = ()) -> Plan:
    """Plan a recipe without reading a tensor; Hub models' weights are not downloaded.

    `recipe` is a YAML file's path or the same structure as a dict, whose relative paths start from the working directory.
    `seed` replaces the recipe's seeds. `clients` are programs that are to run the result, such as "llama.cpp" (see
    `moerge.clients`): what they will do differently is in the plan's `client_warnings`. Raises InputError if the recipe or a
    model is at fault, or if one of the clients cannot run the result.
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
    progress: Progress | bool = False,
    clients: Sequence[str] = (),
) -> MergeResult:
    """Carry out a plan (or a recipe) and write the checkpoint folder `out`.

    `resume` continues an interrupted merge into `out`, and is content with a complete one of the same plan; `force` replaces a
    checkpoint that moerge made there before.
    The result does not depend on `threads` (default: the cores available), and its tensors not on `max_shard_bytes`.
    `progress` is a `Progress` that receives the phases of the work, or True for a display on standard error.
    `clients` are as in `plan`, asked before anything is written; the files do not depend on them.
    Raises InputError for bad input and an existing `out`, MachineError for a full or failing disk, SourceChangedError where a
    model's file was changed since the plan was made.
    """
    plan = plan if isinstance(plan, Plan) else build_plan(load_recipe(plan))
    if plan.recipe.output is not None:
        raise InputError(f"{plan.recipe.source}: its output is an adapter, which moerge.merge_adapters and `moerge merge` write")
    plan = check_plan(plan, clients)
    target, threads = target_of(out), threads or default_threads()
    if resume and (written := _manifest_of(target)):
        plan = _complete(plan)
        if _is_result(target, written, plan, max_shard_bytes):
            workspace(target).clear()
            return MergeResult(target, plan, threads, 0.0, 0.0, tuple(written.get("nonfinite_inputs", ())), was_complete=True)
    if plan.float8 and allow_nonfinite:
        raise InputError("--allow-nonfinite does not go with dtype float8, whose scales would be lost: choose another dtype")
    start = check_start(plan, target, resume=resume, force=force)
    plan = _complete(plan)
    for fitting in plan.fit_jobs:
        fitting.fitter.require()
    shards = _shards(plan, max_shard_bytes)
    begun = time.perf_counter()
    fingerprint = f"{plan.fingerprint}-{max_shard_bytes}-{allow_nonfinite}-{version('moerge')}"
    with reporter(progress) as report, Staging(target, shards, fingerprint, start) as staging:
        store = Float8Store(staging, plan.float8) if plan.float8 else staging
        executor = Executor(store, allow_nonfinite, report.phase("merging", plan.work_bytes))
        executor.run(plan.outputs, threads)
        remarks = fit_outputs(plan, staging, partial(_files, plan), threads, report)
        remarks = (*remarks, *differing(plan.statistics, plan.outputs, staging.inputs), *unlike_integers(plan))
        if remarks:
            plan = replace(plan, warnings=(*plan.warnings, *remarks))
        merged = time.perf_counter()
        check_unchanged(plan.sources)
        staging.complete(_with_manifest(plan, staging), replace=force)
    return MergeResult(target, plan, threads, merged - begun, time.perf_counter() - merged, tuple(staging.nonfinite))


def _complete(plan: Plan) -> Plan:
    """The plan with all inputs on this machine; a download may take hours."""
    if plan.complete:
        return plan
    complete = build_plan(plan.recipe, weights=True, commits=plan.commits)
    return replace(complete, client_warnings=plan.client_warnings, client_notes=plan.client_notes)


def _manifest_of(target: Path) -> Mapping[str, Any]:
    """The manifest of a folder that moerge made, or nothing."""
    try:
        return read_manifest(target) or {}
    except InputError:
        return {}


def _is_result(target: Path, manifest: Mapping[str, Any], plan: Plan, max_shard_bytes: int) -> bool:
    """Tell a checkpoint that this plan has made and nobody has changed since, as far as its headers and small files show it."""
    try:
        opened = open_state_dict(target) if is_state_dict(target) else open_folder(target)
        shards = {file.name for file in opened.files}
    except InputError:
        return False
    same = manifest.get("plan") == plan.fingerprint and manifest["versions"].get("moerge") == version("moerge")
    return same and shards == _shards(plan, max_shard_bytes).keys() and not damaged_files(target, manifest)


def _files(plan: Plan) -> dict[str, bytes]:
    config = {"config.json": to_json(plan.config)} if plan.config else {}
    return {**plan.files, **config, "README.md": model_card(plan).encode()}


def _shards(plan: Plan, max_shard_bytes: int) -> dict[str, list[TensorSpec]]:
    leader = next((model for model in plan.models if model.name == plan.recipe.config), plan.models[0])
    return assign_shards(plan.stored, max_shard_bytes, stem_of(leader))


def _with_manifest(plan: Plan, staging: Staging) -> dict[str, bytes]:
    files = _files(plan)
    digests = {name: file_digest(content) for name, content in sorted(files.items())}
    return {**files, MANIFEST: sealed(build_manifest(plan, staging, digests))}


def check_start(plan: Plan, target: Path, *, resume: bool, force: bool) -> Start:
    """Decide how writing to `target` begins; InputError if it must not, MachineError if the disk is too full."""
    start = start_of(
        target, [(model.name, folder) for model in plan.models for folder in model.folders], resume=resume, force=force
    )
    _check_space(plan, target, staged=start == "resume")
    return start


def start_of(target: Path, sources: Sequence[tuple[str, Path]], *, resume: bool, force: bool) -> Start:
    """Decide how writing to `target` begins by what lies there, which may be none of the `sources`. InputError if it must not."""
    work = workspace(target)
    if work.in_use:
        raise work.busy()
    check_target(target, sources, marks=(MANIFEST,), force=force)
    left = work.interrupted
    if left and not (resume or force):
        raise InputError(
            f"an interrupted merge into {target} lies there: continue it with --resume, or start over with --force",
            code="interrupted-run-exists",
        )
    return "resume" if resume and left else "restart" if left else "new"


def _check_space(plan: Plan, target: Path, *, staged: bool) -> None:
    parent = next(folder for folder in target.parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if not staged and free < plan.output_bytes:
        raise MachineError(
            f"no space for {target}: it needs {as_size(plan.output_bytes)}, {parent} has {as_size(free)} free", code="no-space"
        )
