"""From two models to an adapter: the truncated singular value decomposition of every task vector, one at a time.

Shapes: R rows and C columns of a stored matrix, K the rank.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moerge.checkpoint.adapter import holds_vocabulary, ties_head
from moerge.checkpoint.locate import locate
from moerge.checkpoint.reader import ADAPTER_CONFIG
from moerge.errors import InputError
from moerge.extraction.card import adapter_card, adapter_config
from moerge.extraction.checking import check_with_peft
from moerge.extraction.experts import ExpertsTarget, target_parameters
from moerge.extraction.naming import ModuleNames, is_multimodal, names_for_peft
from moerge.extraction.result import Extraction, Kept
from moerge.extraction.targets import Target, choose_targets
from moerge.extraction.task_vector import squares, task_vector
from moerge.extraction.writer import AdapterWriter, Shape
from moerge.files import check_unchanged, target_of
from moerge.planning.build import build_plan
from moerge.planning.plan import Plan
from moerge.progress import Progress, reporter
from moerge.recipe import load_recipe
from moerge.tensors.dtypes import FLOATS
from moerge.tensors.linalg import Map, leading_svd
from moerge.tensors.streams import read_values
from moerge.tensors.threads import default_threads, single_threaded_blas
from moerge.tensors.views.low_rank import add_product
from moerge.tokenizer import has_tokenizer

DEFAULT_RANK = 16
_PREFIX = "base_model.model."
_TOLERANCE = 1e-3
"""How much singular values may still change: what is lost by it is some thousandths of what the rank could keep, at most."""


def extract(
    expert: str,
    out: str | Path,
    *,
    base: str,
    rank: int | None = None,
    energy: float | None = None,
    modules: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    dtype: str = "float32",
    threads: int | None = None,
    progress: Progress | bool = False,
) -> Extraction:
    """Write the task vector of `expert` on `base` (folders or Hub ids) as a peft LoRA of the given rank (default 16).

    Each matrix becomes its best approximation of that rank (Eckart and Young 1936). With `energy` it gets the smallest rank
    that keeps this share of its squared Frobenius norm, `rank` being the most it may have, if given. `modules` and
    `modules_to_save` are patterns as in a recipe's overrides: what becomes low-rank (default: attention and feed-forward
    matrices), and what is stored whole. `progress` is a `Progress`, or True for a display on standard error.
    The result does not depend on `threads`.
    Raises InputError where the models do not fit together, a pattern matches nothing, or `out` exists.
    """
    if rank is not None and rank < 1:
        raise InputError(f"rank is {rank}: it has to be 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy is {energy}: it is a share, above 0 and at most 1")
    folder = target_of(out)
    begun = time.perf_counter()
    recipe = {"base": base, "experts": {"expert": expert}, "merge": {"method": "task_arithmetic"}, "config": "base"}
    if has_tokenizer(locate(base, name="base", weights=False).folder):
        recipe["tokenizer"] = "base"
    most = rank if rank is not None else DEFAULT_RANK if energy is None else None
    wanted = Wanted(most, energy, tuple(modules), tuple(modules_to_save), dtype)
    _refuse_existing(folder)
    plan = build_plan(load_recipe(recipe), weights=True)
    return extract_plan(plan, folder, wanted, base, expert, begun, threads=threads, progress=progress)


@dataclass(frozen=True)
class Wanted:
    """The parts of a task vector that an adapter is to have.

    `rank` is the most that a matrix may have (None: any), `energy` the share to keep by the smallest rank. `modules` and
    `modules_to_save` are patterns; with `exact` the tensors that these name are the only ones that differ from the base.
    """

    rank: int | None
    energy: float | None
    modules: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    dtype: str
    exact: bool = False


def extract_plan(
    plan: Plan,
    folder: Path,
    wanted: Wanted,
    base: str,
    expert: str,
    begun: float,
    *,
    threads: int | None,
    progress: Progress | bool,
) -> Extraction:
    """Write the task vector of a plan's only expert as an adapter; `base` and `expert` are what its files call the models."""
    _refuse_existing(folder)
    names = names_for_peft(plan)
    targets = choose_targets(plan, wanted.modules, wanted.modules_to_save, names)
    if wanted.exact and (wanted.modules or wanted.modules_to_save):
        targets = [target for target in targets if target.kind != "left out"]
    with (
        reporter(progress) as report,
        AdapterWriter(folder, _largest(targets, wanted.rank, plan), FLOATS[wanted.dtype]) as writer,
    ):
        advance = report.phase("extracting", 2 * sum(target.nbytes for target in targets))
        with single_threaded_blas(), ThreadPoolExecutor(threads or default_threads()) as pool:
            work = _Extraction(plan, names, writer, wanted.rank, wanted.energy, pool.map)
            for target in targets:
                work.add(target)
                advance(2 * target.nbytes)
        check_unchanged(plan.sources)
        return work.publish(base, expert, begun)


def _refuse_existing(folder: Path) -> None:
    if folder.exists():
        raise InputError(f"{folder} already exists: choose another folder", code="target-exists")


def _largest(targets: Sequence[Target | ExpertsTarget], rank: int | None, plan: Plan) -> list[tuple[str, Shape]]:
    """The tensors to be written, as large as they may become."""
    found: list[tuple[str, Shape]] = []
    for target in targets:
        if isinstance(target, ExpertsTarget):
            outputs, inputs = target.shape
            most = target.parameter.experts * min(outputs, inputs, rank or max(outputs, inputs))
            names = (f"{_PREFIX}{name}" for name in target.factor_names)
            found += zip(names, ((most, inputs), (outputs, most)), strict=True)
        elif target.kind in ("lora", "embedding"):
            outputs, inputs = reversed(target.output.shape) if target.transposed else target.output.shape
            most = min(outputs, inputs, rank or max(outputs, inputs))
            found += zip(_factor_names(target), ((most, inputs), (outputs, most)), strict=True)
        elif target.kind == "whole":
            found += [(f"{_PREFIX}{name}", target.output.shape) for name in _saved_names(target, plan)]
    return found


def _factor_names(target: Target) -> tuple[str, str]:
    parts = ("lora_embedding_A", "lora_embedding_B") if target.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    return f"{_PREFIX}{target.module}.{parts[0]}", f"{_PREFIX}{target.module}.{parts[1]}"


def _saved_names(target: Target, plan: Plan) -> tuple[str, ...]:
    """A whole tensor's names: peft wants a tied embedding under the head's name as well."""
    tied = target.output.role == "embedding" and ties_head(plan.models[0])
    return (target.name, "lm_head.weight") if tied else (target.name,)


class _Extraction:
    """An adapter on its way."""

    def __init__(
        self, plan: Plan, names: ModuleNames, writer: AdapterWriter, most: int | None, energy: float | None, spread: Map
    ) -> None:
        self.plan, self.names, self.writer = plan, names, writer
        self.most, self.energy, self.spread = most, energy, spread
        self.kept: dict[tuple[str, str], Kept] = {}
        self.ranks: dict[str, int] = {}
        self.saved: dict[str, None] = {}
        self.targets: dict[str, Target] = {}
        self.experts: dict[str, ExpertsTarget] = {}

    def add(self, target: Target | ExpertsTarget) -> None:
        """Store what is wanted of one tensor, and count what is lost."""
        kept = self.kept.setdefault((target.role, target.kind), Kept(target.role, target.kind))
        if isinstance(target, ExpertsTarget):
            kept.add(*self._experts(target))
            return
        if target.kind == "whole":
            kept.add(self._whole(target), 0.0, None)
            return
        tau_RC = task_vector(*target.pair).reshape(target.output.shape)
        total = squares(tau_RC)
        if target.kind == "left out":
            kept.add(total, total, None)
        elif total == 0:  # nothing was trained here: peft is not told of this module
            kept.add(0.0, 0.0, None)
        else:
            rank = self._low_rank(target, tau_RC, total)
            kept.add(total, squares(tau_RC), rank)

    def _whole(self, target: Target) -> float:
        """Store the expert's own tensor; the squared norm of its task vector."""
        base, expert = target.pair
        values_N = read_values(expert)
        for name in _saved_names(target, self.plan):
            self.writer.add(f"{_PREFIX}{name}", values_N.reshape(target.output.shape))
            self.saved[name.rpartition(".")[0]] = None
        return squares(values_N - read_values(base))

    def _experts(self, target: ExpertsTarget) -> tuple[float, float, int]:
        """Store the factors of all experts of a layer; their squared norm, what is lost of it, and the rank."""
        factors, sizes = [], []
        for expert in range(target.parameter.experts):
            tau_OI = target.task_vector(expert)
            sizes.append(squares(tau_OI))
            left_OK, sigma_K, right_KI = self._decomposed(tau_OI, sizes[-1])
            root_K = np.sqrt(sigma_K)
            factors.append((left_OK * root_K, right_KI * root_K[:, None]))
        a, b, rank = target.packed(factors)
        a, b = (self.writer.add(f"{_PREFIX}{name}", part) for name, part in zip(target.factor_names, (a, b), strict=True))
        lost = 0.0
        for expert in range(target.parameter.experts):
            tau_OI = target.task_vector(expert)
            left_OK = np.ascontiguousarray(b.reshape(len(b), rank, -1)[:, :, expert])
            add_product(left_OK, a[expert * rank : (expert + 1) * rank], np.float32(-1), 0, tau_OI)
            lost += squares(tau_OI)
        self.experts[target.name] = target
        self.ranks[target.name] = rank
        return sum(sizes), lost, rank

    def _low_rank(self, target: Target, tau_RC: np.ndarray, total: float) -> int:
        """Store the factors of a task vector; what they do not express is left in it."""
        left_RK, sigma_K, right_KC = self._decomposed(tau_RC, total)
        root_K = np.sqrt(sigma_K)
        left_RK, right_KC = left_RK * root_K, right_KC * root_K[:, None]
        a_name, b_name = _factor_names(target)
        if target.transposed:
            left_RK, right_KC = self.writer.add(a_name, left_RK.T).T, self.writer.add(b_name, right_KC.T).T
        else:
            right_KC, left_RK = self.writer.add(a_name, right_KC), self.writer.add(b_name, left_RK)
        add_product(np.ascontiguousarray(left_RK), np.ascontiguousarray(right_KC), np.float32(-1), 0, tau_RC)
        self.ranks[target.module] = len(sigma_K)
        self.targets[target.module] = target
        return len(sigma_K)

    def _decomposed(self, tau_RC: np.ndarray, total: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The leading vectors: as many as allowed, or the fewest that have enough of the norm."""
        limit = min(*tau_RC.shape, self.most or max(tau_RC.shape))
        tried = limit if self.energy is None else min(limit, DEFAULT_RANK)
        while True:
            left_RK, sigma_K, right_KC = leading_svd(tau_RC, tried, tolerance=_TOLERANCE, spread=self.spread)
            if self.energy is None:
                return left_RK, sigma_K, right_KC
            gathered_K = np.cumsum(np.square(sigma_K, dtype=np.float64))
            needed = int(np.searchsorted(gathered_K, self.energy * total)) + 1
            if needed <= tried or tried == limit:
                needed = min(needed, tried)
                return left_RK[:, :needed], sigma_K[:needed], right_KC[:needed]
            tried = min(limit, 4 * tried)

    def publish(self, base: str, expert: str, begun: float) -> Extraction:
        """Complete the folder; InputError if there is nothing to store."""
        if not self.ranks and not self.saved:
            raise InputError(f"{expert} equals {base} in all that was asked for: there is nothing to extract")
        rank, revision = max(self.ranks.values(), default=1), self.plan.models[0].revision
        found = Extraction(
            folder=self.writer.target,
            base=base if revision is None else base.partition("@")[0],
            expert=expert,
            parameters=self.writer.parameters,
            nbytes=self.writer.parameters * self.writer.dtype.itemsize,
            rank=rank,
            roles=tuple(self.kept.values()),
            seconds=time.perf_counter() - begun,
            warnings=(*self.plan.warnings, *self._without_tokens(), *self._left_out()),
            revision=revision,
        )
        modules = [name.rpartition(".")[0] for name in self.names.by_file.values()]
        tied = ties_head(self.plan.models[0]) and any(holds_vocabulary(f"{name}.weight") for name in self.saved)
        experts = target_parameters(list(self.experts.values()), self.names.memory)
        config = adapter_config(found, list(self.targets.values()), self.ranks, list(self.saved), modules, tied, experts)
        if self.names.memory:
            check_with_peft(self.plan.models[0], config, self.writer.shapes)
        self.writer.publish(
            {ADAPTER_CONFIG: config, "README.md": adapter_card(found, multimodal=is_multimodal(self.plan.models[0]))}
        )
        return found

    def _without_tokens(self) -> list[str]:
        """A warning about the expert's tokens that the base, and so the adapter, has no rows for."""
        counts = self.plan.vocabulary.get("models", {}).get("expert", {})
        if not counts.get("left_out"):
            return []
        return [f"the expert has {counts['left_out']:,} tokens that the base lacks, and an adapter adds none: they are left out"]

    def _left_out(self) -> list[str]:
        """A warning about what trained tensors the adapter lacks."""
        lost = {kept.role: kept.total for kept in self.kept.values() if kept.kind == "left out" and kept.total}
        if not lost:
            return []
        part = sum(lost.values()) / sum(kept.total for kept in self.kept.values())
        first = [role.removeprefix("layers.*.") for role in sorted(lost, key=lambda role: -lost[role])[:3]]
        more = f" and {len(lost) - 3} more roles" if len(lost) > 3 else ""
        return [
            f"{', '.join(first)}{more} are left out: {100 * part:.2g}% of the task vector's squared norm "
            "(--modules-to-save stores tensors whole)"
        ]
