"""The last step of assembling a MoE whose router is computed: its gates, once everything else is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from moerge.architecture import family_of
from moerge.checkpoint.digest import CHUNK, chunk_digest, tensor_digest
from moerge.checkpoint.staging import Staging
from moerge.methods.codec import encode
from moerge.moe.context import FitContext
from moerge.moe.crew import one_thread_each
from moerge.planning.operations import Fit, Output
from moerge.planning.plan import Plan


def fit_gates(
    plan: Plan,
    staging: Staging,
    files: Callable[[], Mapping[str, bytes]],
    threads: int,
    calibrating: Callable[[int], Callable[[int], None]] | None = None,
) -> tuple[str, ...]:
    """Compute and store the gates that `plan` leaves to a fitted router; returns what the user should know about them.

    `files()` make the staging folder a checkpoint that loads. Gates that an interrupted run has completed are kept. The gates do
    not depend on `threads`. `calibrating` is called with the number of texts and returns what is told of those that are done.
    """
    gates = tuple(output for output in plan.outputs if isinstance(output.operation, Fit))
    if not gates:
        return ()
    assert isinstance(gates[0].operation, Fit)
    router = gates[0].operation.router
    context = _context(plan, staging, gates)
    if not all(staging.finished(gate) for gate in gates):
        staging.add(files())
        texts = sum(len(texts.documents) for texts in plan.calibration)
        advance = calibrating(texts) if calibrating and texts else context.advance
        with one_thread_each():
            fitted = router.fit(replace(context, threads=threads, advance=advance))
        for gate in gates:
            _store(staging, gate, fitted[gate.name], context.read_digests)
    return router.remarks(context)


def _context(plan: Plan, staging: Staging, gates: tuple[Output, ...]) -> FitContext:
    return FitContext(
        folder=staging.folder,
        gates=gates,
        experts=plan.experts,
        texts={texts.expert: texts for texts in plan.calibration},
        digests={o.role: staging.digests[o.name] for o in plan.outputs if not isinstance(o.operation, Fit)},
        models={model.name: model for model in plan.models},
        family=family_of(plan.models[0].config),
        relative_to=plan.recipe.folder,
    )


def _store(staging: Staging, gate: Output, values_EH: np.ndarray, inputs: Mapping[str, str]) -> None:
    if values_EH.shape != gate.shape or not np.isfinite(values_EH).all():
        raise AssertionError(f"{gate.name}: a router computed {values_EH.shape}, finite or not, instead of {gate.shape}")
    stored_N = np.empty(gate.size, gate.dtype.storage)
    encode(np.ascontiguousarray(values_EH, np.float32).reshape(-1), gate.dtype, stored_N)
    staging.write(gate, 0, stored_N)
    digest = tensor_digest(chunk_digest(stored_N[start : start + CHUNK]) for start in range(0, gate.size, CHUNK))
    staging.done(gate, digest, dict(inputs), [])
