"""Checks, before merging, that an inference engine will run the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from moerge.architecture.sequence import HETEROGENEOUS
from moerge.clients.limits import LIMITS, OWN_FORMATS, RUNS, UNTRIED, VERSIONS
from moerge.clients.result import Result
from moerge.errors import InputError, suggest
from moerge.planning.plan import Plan


@dataclass(frozen=True)
class Finding:
    """An effect of a client on a result: one sentence without its full stop."""

    client: str
    effect: Literal["cannot", "differs", "unknown", "note"]
    sentence: str


def clients() -> list[str]:
    """Names of the programs whose limits moerge knows."""
    return sorted(RUNS)


def check_result(result: Result, client: str) -> list[Finding]:
    """Return the known effects of this client on this result; none means that it runs and agrees with transformers.

    Raises InputError for a client that moerge does not know.
    """
    if client not in RUNS:
        raise InputError(f"unknown client {client!r}: {suggest(client, RUNS)}", code="unknown-name")
    if result.model_type not in RUNS[client]:
        return [_not_run(result, client)]
    return [
        Finding(client, limit.effect, f"{client} {limit.what}: {limit.instead}")
        for limit in LIMITS
        if limit.client == client and (not limit.types or result.model_type in limit.types) and limit.applies(result)
    ]


def _not_run(result: Result, client: str) -> Finding:
    kind = result.model_type
    if kind in OWN_FORMATS:
        native = "choose a native moe.format for token-routed experts, or leave out `moe` for a dense model"
        if kind == HETEROGENEOUS:
            native = "experts of different architectures fit no other, so serve it with transformers, or the experts one by one"
        only = "only transformers 5.5 and newer do"
        return Finding(client, "cannot", f"{client} does not run moerge's own architecture, {only}: {native}")
    if kind not in UNTRIED and any(kind in types for types in RUNS.values()):
        others = sorted(other for other, types in RUNS.items() if kind in types)
        dense = ", or leave out `moe` for a dense model" if result.experts else ""
        return Finding(client, "cannot", f"{client} does not run {kind} models: use {' or '.join(others)} instead{dense}")
    return Finding(client, "unknown", f"whether {client} runs {kind or 'such'} models is not known to moerge: try it")


def check_folder(folder: Path, client: str) -> str:
    """Return the expected outcome for a checkpoint on disk: "runs", "differs", "cannot" or "unknown"."""
    effects = {finding.effect for finding in check_result(Result.in_folder(folder), client)} - {"note"}
    return next((effect for effect in ("cannot", "unknown", "differs") if effect in effects), "runs")


def check_plan(plan: Plan, wanted: Iterable[str]) -> Plan:
    """The plan with a warning for everything that one of these clients will do differently.

    Raises InputError, in one sentence, where a client cannot run the result at all.
    """
    wanted = tuple(wanted)
    if not wanted:
        return plan
    result = Result.of(plan.config, plan.files, joined=plan.recipe.tokenizer == "union")
    findings = [finding for client in dict.fromkeys(wanted) for finding in check_result(result, client)]
    fatal = next((finding for finding in findings if finding.effect == "cannot"), None)
    if fatal:
        raise InputError(fatal.sentence, code="client-cannot-run")
    warnings = (finding.sentence for finding in findings if finding.effect in ("differs", "unknown"))
    notes = (finding.sentence for finding in findings if finding.effect == "note")
    return replace(
        plan,
        client_warnings=tuple(dict.fromkeys((*plan.client_warnings, *warnings))),
        client_notes=tuple(dict.fromkeys((*plan.client_notes, *notes))),
    )


def versions(client: str) -> str:
    """The version that moerge's knowledge of a client is about."""
    return VERSIONS[client]
