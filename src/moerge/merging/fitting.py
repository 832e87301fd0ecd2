"""The last step of assembling a MoE some of whose tensors are computed from the others, once these are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moerge.architecture.registry import gate_kind
from moerge.checkpoint.staging import Staging
from moerge.errors import InputError
from moerge.operations.fitter import FitContext, Fitter, Unit
from moerge.operations.operations import Fit, Output
from moerge.planning.plan import Plan
from moerge.progress import SILENT, Progress
from moerge.tensors.codec import decode, encode
from moerge.tensors.digest import CHUNK, chunk_digest, tensor_digest
from moerge.tensors.threads import single_threaded_blas
from moerge.texts import Texts


def fit_outputs(
    plan: Plan,
    staging: Staging,
    files: Callable[[], Mapping[str, bytes]],
    threads: int,
    progress: Progress = SILENT,
) -> tuple[str, ...]:
    """Compute and store what `plan` leaves to fitters, one after the other; returns what the user should know about it.

    `files()` make the staging folder a checkpoint that loads. What an interrupted run has completed is kept, unless a fitter
    was not done with all of its tensors. Nothing depends on `threads`. `progress` gets a phase for
    each unit that fitters count, texts or tokens.
    """
    remarks: tuple[str, ...] = ()
    fit_jobs = [(fitting, _context(plan, staging, fitting.outputs)) for fitting in plan.fit_jobs]
    pending = [fitting for fitting, _ in fit_jobs if not all(map(staging.finished, fitting.outputs))]
    if pending:
        staging.add(files())
    counters = _Counters([fitting.fitter for fitting in pending], plan.calibration, progress)
    for fitting, context in fit_jobs:
        if fitting in pending:
            counter = counters.of(fitting.fitter)
            with single_threaded_blas():
                fitted = fitting.fitter.fit(replace(context, threads=threads, advance=counter.advance))
            counter.advance(counter.left)
            for output in fitting.outputs:
                _store(staging, output, fitted[output.name], context.read_digests)
        remarks += fitting.fitter.remarks(context)
    return remarks


@dataclass
class _Counter:
    """The progress of a fitter, never more than it announced."""

    left: int
    tell: Callable[[int], None]

    def advance(self, count: int) -> None:
        count = min(count, self.left)
        self.left -= count
        self.tell(count)


class _Counters:
    """A counter for each fitter; those that count the same thing count towards one total."""

    def __init__(self, fitters: Sequence[Fitter], calibration: Sequence[Texts], progress: Progress) -> None:
        self._fitters, self._calibration, self._progress = fitters, calibration, progress
        self._tell: dict[Unit, Callable[[int], None]] = {}

    def of(self, fitter: Fitter) -> _Counter:
        """Return the counter of a fitter; the phase starts once the first fitter of its unit begins."""
        if fitter.counts not in self._tell:
            total = sum(other.steps(self._calibration) for other in self._fitters if other.counts == fitter.counts)
            name = "calibrating" if fitter.counts == "texts" else "fitting projectors"
            self._tell[fitter.counts] = self._progress.phase(name, total, fitter.counts)
        return _Counter(fitter.steps(self._calibration), self._tell[fitter.counts])


def _context(plan: Plan, staging: Staging, outputs: tuple[Output, ...]) -> FitContext:
    return FitContext(
        folder=staging.folder,
        outputs=outputs,
        experts=plan.experts,
        texts={texts.expert: texts for texts in plan.calibration},
        digests={o.role: staging.digests[o.name] for o in plan.outputs if not isinstance(o.operation, Fit)},
        models={model.name: model for model in plan.models},
        family=plan.family,
        relative_to=plan.recipe.folder,
        gate=gate_kind(str(plan.config.get("model_type"))),
    )


def _store(staging: Staging, output: Output, values: np.ndarray, inputs: Mapping[str, str]) -> None:
    if values.shape != output.shape or not np.isfinite(values).all():
        raise AssertionError(f"{output.name}: a fitter computed {values.shape}, finite or not, instead of {output.shape}")
    stored_N = np.empty(output.size, output.dtype.storage)
    values_N = np.ascontiguousarray(values, np.float32).reshape(-1)
    encode(values_N, output.dtype, stored_N)
    if not decode(stored_N, output.dtype, np.empty_like(values_N)):
        raise InputError(
            f"{output.name}: what was computed is too large for {output.dtype.name}: raise the router's temperature, or choose "
            "another dtype"
        )
    staging.write(output, 0, stored_N)
    digest = tensor_digest(chunk_digest(stored_N[start : start + CHUNK]) for start in range(0, output.size, CHUNK))
    staging.done(output, digest, dict(inputs), [])
