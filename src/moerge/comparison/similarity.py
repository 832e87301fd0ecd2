"""Similarity of experts per layer and role: from sums over every tensor to figures of parts, layers, roles and the model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from moerge.comparison.compared import Part, densities, operation_of, part_of
from moerge.comparison.sums import ExpertSums, PairSums, TensorSums, names_of, read, statistic
from moerge.execution.executor import Executor
from moerge.execution.schedule import Job, run_jobs
from moerge.methods.method import Measurement
from moerge.operations.operations import Merge
from moerge.planning.plan import Plan
from moerge.results import Data, Share

Scope = Literal["part", "layer", "role", "model"]
"""What a row is about: a part of a layer (attention.q), a role in a layer (figure 4), a role in all layers, or everything."""


class Region(NamedTuple):
    """Tensors that are looked at as one long vector. `layer` is None for all layers, and outside of them."""

    scope: Scope
    layer: int | None
    role: str


class _InRegion(Data):
    scope: Scope
    layer: int | None
    role: str


class Pair(_InRegion):
    """Two experts in a region: their task vectors or, without a base, their parameters.

    `sign_conflict` is the share of all parameters with entries of opposite sign, `sign_conflict_changed` that among the
    parameters which both changed, `sign_conflict_weighted` that with weight |tau_i * tau_j|, which is (1 - c) / 2 for
    c = sum tau_i tau_j / sum |tau_i tau_j|. `distance` is that of the parameters, ||theta_i - theta_j||, and `relative_distance`
    it over sqrt(||theta_i|| ||theta_j||): sqrt(2) for unrelated parameters. None where a vector is zero.
    """

    a: str
    b: str
    parameters: int
    cosine: float | None
    sign_conflict: float
    sign_conflict_changed: float | None
    sign_conflict_weighted: float | None
    distance: float
    relative_distance: float | None
    parameter_cosine: float | None


class Expert(_InRegion):
    """An expert in a region.

    `norm` is that of its task vector or, without a base, of its parameters; all that follows needs a base. `relative_norm` is
    over the base's, `base_cosine` that of its parameters and the base's, `changed` the share of parameters that differ.
    `averaged` is what is left of its task vector in the plain average of all: the average's projection on it, over its norm;
    1 / K if the others are orthogonal to it. Of sum |tau|, TIES drops the share `trimmed` as too small and `outvoted` as of the
    wrong sign, and merges `survives`.
    """

    expert: str
    parameters: int
    norm: float
    relative_norm: float | None = None
    base_cosine: float | None = None
    changed: float | None = None
    averaged: float | None = None
    trimmed: Share | None = None
    outvoted: Share | None = None
    survives: Share | None = None


@dataclass(frozen=True)
class Similarity:
    """Figures of all regions. `pairs` and `rows` are in the model's order, from parts to the whole.

    `anchored` says whether there is a base; `densities` are what TIES keeps, none without a base.
    """

    experts: tuple[str, ...]
    anchored: bool
    densities: tuple[float, ...]
    pairs: tuple[Pair, ...]
    rows: tuple[Expert, ...]

    def pairs_of(self, scope: Scope, role: str | None = None) -> list[Pair]:
        """The pairs' rows of one scope, of one role or of all."""
        return [pair for pair in self.pairs if pair.scope == scope and role in (None, pair.role)]

    def rows_of(self, scope: Scope, role: str | None = None) -> list[Expert]:
        """The experts' rows of one scope, of one role or of all."""
        return [row for row in self.rows if row.scope == scope and role in (None, row.role)]

    @property
    def roles(self) -> list[str]:
        """All roles."""
        return list(dict.fromkeys(row.role for row in self.rows_of("role")))


def measure(plan: Plan, threads: int, advance: Callable[[int], None] = lambda nbytes: None) -> list[TensorSums]:
    """The sums of every output of a compared plan; `advance` is told the bytes read, `work_bytes` of them in all."""
    executor = Executor(advance=advance)
    operations = [operation_of(output) for output in plan.outputs]
    found: list[TensorSums | None] = [None] * len(operations)

    def of_tensor(index: int, operation: Merge) -> Job:
        lowest_K = yield from executor.statistic(operation)
        total = yield from executor.measure(_once(operation, lowest_K), 1, [operation])
        found[index] = read(operation, total)

    executor.measure_model(operations, threads)
    run_jobs((of_tensor(index, operation) for index, operation in enumerate(operations)), threads)
    return [sums for sums in found if sums is not None]


def _once(operation: Merge, lowest_K: Any) -> Measurement:
    return (yield statistic(operation, lowest_K))


def work_bytes(plan: Plan) -> int:
    """Bytes that comparing reads, at most."""
    operations = map(operation_of, plan.outputs)
    return sum((1 + op.method.measures) * sum(source.tensor.nbytes for source in op.values) for op in operations)


def summarize(plan: Plan, sums: Sequence[TensorSums]) -> Similarity:
    """The figures of all regions from the sums of every tensor."""
    anchored = any(operation_of(output).base is not None for output in plan.outputs)
    experts: dict[tuple[Region, str], list[ExpertSums]] = defaultdict(list)
    pairs: dict[tuple[Region, str, str], list[PairSums]] = defaultdict(list)
    for region, tensor in _by_region([part_of(output) for output in plan.outputs], sums):
        for name, mine in tensor.experts.items():
            experts[region, name].append(mine)
        for names, both in tensor.pairs.items():
            pairs[region, *names].append(both)
    return Similarity(
        names_of(sums),
        anchored,
        densities(plan),
        tuple(_pair(*place, PairSums._make(_totals(listed))) for place, listed in pairs.items()),
        tuple(_expert(*place, ExpertSums._make(_totals(listed)), anchored) for place, listed in experts.items()),
    )


def _totals(rows: Sequence[tuple[float, ...]]) -> Iterator[float]:
    return map(math.fsum, zip(*rows, strict=True))


def _by_region(parts: Sequence[Part], sums: Sequence[TensorSums]) -> Iterator[tuple[Region, TensorSums]]:
    """Every region that a tensor belongs to, region by region."""
    kinds: list[Callable[[Part], Region]] = [
        lambda part: Region("part", part.layer, part.name),
        lambda part: Region("layer", part.layer, part.role),
        lambda part: Region("role", None, part.role),
        lambda part: Region("model", None, "all"),
    ]
    for kind in kinds:
        yield from ((kind(part), tensor) for part, tensor in zip(parts, sums, strict=True))


def _pair(region: Region, a: str, b: str, sums: PairSums) -> Pair:
    distance = math.sqrt(max(0.0, sums.square_a + sums.square_b - 2 * sums.dot))
    return Pair(
        **region._asdict(),
        a=a,
        b=b,
        parameters=int(sums.parameters),
        cosine=_cosine(sums.dot, sums.square_a, sums.square_b),
        sign_conflict=sums.conflicts / sums.parameters,
        sign_conflict_changed=_ratio(sums.conflicts, sums.both),
        sign_conflict_weighted=_ratio(sums.weight - sums.dot, 2 * sums.weight),
        distance=distance,
        relative_distance=_ratio(distance, (max(0.0, sums.theta_square_a) * max(0.0, sums.theta_square_b)) ** 0.25),
        parameter_cosine=_cosine(sums.theta_dot, sums.theta_square_a, sums.theta_square_b),
    )


def _expert(region: Region, name: str, sums: ExpertSums, anchored: bool) -> Expert:
    norm = math.sqrt(sums.square)
    about = {**region._asdict(), "expert": name, "parameters": int(sums.parameters), "norm": norm}
    if not anchored:
        return Expert(**about)
    theta_square = sums.base_square + 2 * sums.base_dot + sums.square
    return Expert(
        **about,
        relative_norm=_ratio(norm, math.sqrt(sums.base_square)),
        base_cosine=_cosine(sums.base_square + sums.base_dot, sums.base_square, theta_square),
        changed=sums.changed / sums.parameters,
        averaged=_ratio(sums.averaged, sums.square),
        trimmed=_ratio(sums.mass - sums.kept, sums.mass),
        outvoted=_ratio(sums.kept - sums.elected, sums.mass),
        survives=_ratio(sums.elected, sums.mass),
    )


def _cosine(dot: float, square_a: float, square_b: float) -> float | None:
    cosine = _ratio(dot, math.sqrt(max(0.0, square_a)) * math.sqrt(max(0.0, square_b)))
    return None if cosine is None else min(1.0, max(-1.0, cosine))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
