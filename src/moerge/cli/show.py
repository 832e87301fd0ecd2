"""Results as tables for people and JSON for programs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moerge.errors import InputError
from moerge.inference.generation import Generation
from moerge.inference.routes import Routes
from moerge.inspection import Inspection, Verification
from moerge.pipeline import MergeResult
from moerge.planning.plan import Plan

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes from text such as "500MB" or "5 GiB"; InputError otherwise."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise InputError(f"{text!r} is not a size: write a number and a unit, such as 500MB or 5GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def print_json(value: Mapping[str, Any]) -> None:
    """Print JSON on standard output."""
    json.dump(value, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


def plan(planned: Plan, threads: int, *, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        print_json(planned.summary(threads))
        return
    console = Console()
    sort = "sequence-routed MoE" if planned.recipe.moe and planned.recipe.moe.by_sequence else "MoE"
    shape = f"{sort} of {len(planned.experts)} experts ({', '.join(planned.experts)})" if planned.experts else "dense model"
    console.print(
        f"[bold]{escape(planned.recipe.source)}[/bold]: {shape}, {_count(planned.parameters)} parameters", highlight=False
    )
    table = _table("model", "location", "type", "size", "dtype")
    for model in planned.models:
        dtypes = ", ".join(sorted({tensor.dtype.name for tensor in model.tensors.values()}))
        table.add_row(model.name, model.location, model.model_type, _size(model.nbytes), dtypes)
    console.print(table)
    table = _table("operation", "tensors", "output", "hyperparameters")
    for row in _operations(planned):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"reads {_size(planned.input_bytes)}, writes {_size(planned.output_bytes)}, "
        f"memory below {_size(planned.memory_bytes(threads))} with {threads} threads, roughly {_time(planned.seconds)}",
        highlight=False,
    )
    for note in planned.notes:
        console.print(note, highlight=False)
    _warn(planned.warnings)


def _operations(planned: Plan) -> Sequence[tuple[str, str, str, str]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for output in planned.outputs:
        groups.setdefault((output.action, output.hyperparameters), []).append(output.nbytes)
    return [(action, str(len(sizes)), _size(sum(sizes)), parameters) for (action, parameters), sizes in groups.items()]


def merge(result: MergeResult, *, quiet: bool, as_json: bool) -> None:
    """Print what a merge did."""
    if as_json:
        print_json(result.to_json())
        return
    _warn(result.plan.warnings)
    if result.nonfinite_inputs:
        _warn([f"inputs with NaN or infinity went into the merge: {', '.join(result.nonfinite_inputs)}"])
    if quiet:
        return
    moved = result.plan.input_bytes + result.plan.output_bytes
    Console().print(
        f"{escape(str(result.folder))}: {_count(result.plan.parameters)} parameters, {_size(result.plan.output_bytes)}, "
        f"merged in {_time(result.merge_seconds)} ({_size(int(moved / max(result.merge_seconds, 1e-9)))}/s), "
        f"made durable in {_time(result.publish_seconds)}",
        highlight=False,
    )


def verification(found: Verification, *, quiet: bool, as_json: bool) -> None:
    """Print whether a checkpoint is intact."""
    if as_json:
        print_json(found.to_json())
        return
    for problem in found.problems:
        print(f"moerge: {found.checkpoint.folder}: {problem}", file=sys.stderr)
    if not found.problems and not quiet:
        basis = "and equal to the manifest" if found.against_manifest else "(no manifest to compare with)"
        Console().print(f"{found.tensors} tensors, {_size(found.nbytes)}: all present, finite {basis}", highlight=False)


def inspection(found: Inspection, *, as_json: bool) -> None:
    """Print what a checkpoint is."""
    if as_json:
        print_json(found.to_json())
        return
    console = Console()
    facts = found.to_json()
    family = found.family or f"{found.checkpoint.model_type or 'no model_type'} (unknown to moerge)"
    console.print(f"[bold]{escape(str(found.checkpoint.folder))}[/bold]", highlight=False)
    table = _table("", "")
    table.show_header = False
    table.add_row("family", family)
    table.add_row("parameters", f"{found.parameters:,} ({_size(found.checkpoint.nbytes)})")
    table.add_row("stored as", ", ".join(f"{name} {_count(size)}" for name, size in found.dtypes.items()))
    table.add_row("layers, width", f"{facts['layers']}, {facts['hidden_size']}")
    table.add_row("embeddings", "tied" if facts["tied_embeddings"] else "untied")
    tokens = f"{found.vocabulary:,} tokens" if found.vocabulary else "not readable as a table" if found.files else "none"
    table.add_row("tokenizer", tokens)
    if found.manifest:
        made = found.manifest
        method = (made["recipe"].get("merge") or {}).get("method", "average")
        table.add_row("made by", f"moerge {made['versions']['moerge']}, {method} of {', '.join(made['models'])}")
        if made["experts"]:
            table.add_row("experts", ", ".join(f"{index} {name}" for index, name in enumerate(made["experts"])))
    console.print(table)
    roles = _table("role", "shape", "tensors", "parameters")
    for role in found.roles:
        roles.add_row(role.role, " x ".join(map(str, role.shape)), str(role.tensors), _count(role.parameters))
    console.print(roles)


def generation(found: Generation, *, as_json: bool) -> None:
    """Print what a model wrote, and nothing else."""
    if as_json:
        print_json(found.to_json())
    else:
        print(found.text)


def routes(found: Routes, *, as_json: bool) -> None:
    """Print how texts are routed: for each expert its mean weight, and in brackets how often it is first."""
    if as_json:
        print_json(found.to_json())
        return
    console = Console()
    table = _table("text", "documents", *found.experts, "entropy", "accuracy")
    for column in table.columns[1:]:
        column.justify = "right"
    for text in found.texts:
        shares = [f"{100 * alpha:.1f} ({100 * first:.0f})" for alpha, first in zip(text.alpha_E, text.first_E, strict=True)]
        table.add_row(text.name, str(text.documents), *shares, f"{text.entropy:.2f}", _percent(text.accuracy))
    table.add_row("mean", "", *(f"{100 * alpha:.1f}" for alpha in found.load_E), "", _percent(found.accuracy))
    console.print(table)
    per = "sequences" if found.level == "sequence" else "tokens and layers"
    console.print(
        f"mean weight in %, in brackets the share of {per} for which an expert is first; load balance {found.balance:.2f} "
        f"(1: even, {len(found.experts)}: all to one)",
        highlight=False,
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in ("size", "tensors", "output", "parameters") else "left")
    return table


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _size(nbytes: int) -> str:
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes} B"


def _count(number: int) -> str:
    for unit, factor in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return str(number)


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
