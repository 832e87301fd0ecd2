"""Print plans, merges, verifications and inspections."""

from __future__ import annotations

import json
import sys

from moerge.cli.console import Table, print_json, print_warnings, say, show_table, view
from moerge.cli.views.adapters import adapter_rows
from moerge.errors import one_line
from moerge.formatting import as_count, as_size, as_time
from moerge.inspection import Inspection, Verification
from moerge.merging.pipeline import MergeResult
from moerge.planning.plan import Plan
from moerge.renewal import Refreshed

_LISTED = 8
"""More experts than this are not listed one by one."""


def plan(planned: Plan, threads: int, *, as_json: bool) -> None:
    """Print a plan."""
    if as_json:
        print_json(planned.summary(threads))
        return
    sort = "sequence-routed MoE" if planned.recipe.moe and planned.recipe.moe.by_sequence else "MoE"
    shape = f"{sort} of {len(planned.experts)} experts ({', '.join(planned.experts)})" if planned.experts else "dense model"
    say((planned.recipe.source, "bold"), f": {shape}, {as_count(planned.parameters)} parameters")
    table = Table("model", "location", "type", "size", "dtype")
    for model in planned.models:
        table.add_row(model.name, model.location, model.model_type, as_size(model.nbytes), model.stored_as)
    show_table(table)
    table = Table("operation", "tensors", "output", "hyperparameters")
    for row in planned.operations:
        table.add_row(row["action"], str(row["tensors"]), as_size(row["bytes"]), row["hyperparameters"])
    show_table(table)
    time = as_time(planned.seconds)
    if planned.fit_jobs:
        titles = " and ".join(dict.fromkeys(fitting.fitter.title for fitting in planned.fit_jobs))
        time += f" ({titles} very roughly {as_time(planned.fitting_seconds)} of it)"
    say(
        f"reads {as_size(planned.input_bytes)}, writes {as_size(planned.output_bytes)}, "
        f"memory below {as_size(planned.memory_bytes(threads))} with {threads} threads, roughly {time}",
    )
    for note in (*planned.notes, *planned.client_notes):
        say(note)
    print_warnings((*planned.warnings, *planned.client_warnings))


def recipe(planned: Plan) -> None:
    """Print a plan's recipe in moerge's own format, as YAML."""
    import yaml

    from moerge.planning.equivalent import equivalent_recipe

    plain = json.loads(json.dumps(equivalent_recipe(planned)))  # without anchors
    sys.stdout.write(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    print_warnings((*planned.warnings, *planned.client_warnings))


def merge(result: MergeResult, *, quiet: bool, as_json: bool) -> None:
    """Print what a merge did."""
    if as_json:
        print_json(result.to_json())
        return
    print_warnings((*result.plan.warnings, *result.plan.client_warnings))
    if result.nonfinite_inputs:
        print_warnings([f"inputs with NaN or infinity went into the merge: {', '.join(result.nonfinite_inputs)}"])
    if quiet:
        return
    if result.was_complete:
        say(f"{result.folder} is complete already, of the same plan: nothing was done")
        return
    moved = result.plan.input_bytes + result.plan.output_bytes
    say(
        f"{result.folder}: {as_count(result.plan.parameters)} parameters, {as_size(result.plan.output_bytes)}, "
        f"merged in {as_time(result.merge_seconds)} ({as_size(int(moved / max(result.merge_seconds, 1e-9)))}/s), "
        f"made durable in {as_time(result.publish_seconds)}",
    )


def verification(found: Verification, *, quiet: bool, as_json: bool) -> None:
    """Print whether a checkpoint is intact."""
    if as_json:
        print_json(found.to_json())
        return
    for problem in found.problems:
        print(one_line(f"moerge: {found.checkpoint.folder}: {problem}"), file=sys.stderr)
    if not found.problems and not quiet:
        basis = "and equal to the manifest" if found.against_manifest else "(no manifest to compare with)"
        say(f"{found.tensors} tensors, {as_size(found.nbytes)}: all present, finite {basis}")
        for note in found.notes:
            say(note)


@view
def refreshed(found: Refreshed) -> None:
    """Print which files of code are new."""
    removed = f", {', '.join(found.removed)} removed" if found.removed else ""
    say(f"{found.folder}: {', '.join(found.written) or 'nothing'} written{removed}")


@view
def inspection(found: Inspection) -> None:
    """Print what a checkpoint is."""
    facts = found.to_json()
    family = found.family or f"{found.checkpoint.model_type or 'no model_type'} (unknown to moerge)"
    say((str(found.checkpoint.folder), "bold"))
    table = Table("", "")
    table.show_header = False
    if found.adapter:
        adapter_rows(table, found.adapter)
    else:
        table.add_row("family", family)
    table.add_row("parameters", f"{found.parameters:,} ({as_size(found.checkpoint.nbytes)})")
    table.add_row("stored as", ", ".join(f"{name} {as_count(size)}" for name, size in found.dtypes.items()))
    for whole in facts["expert_models"]:
        described = (
            f"{whole['layers']} layers, width {whole['hidden_size']}, {as_count(whole['parameters'])} parameters of its own"
        )
        table.add_row(f"expert {whole['name']}", f"{whole['model_type']}, {described}")
    if not found.adapter and not facts["expert_models"]:
        table.add_row("layers, width", f"{facts['layers']}, {facts['hidden_size']}")
        table.add_row("embeddings", "tied" if facts["tied_embeddings"] else "untied")
    rows = f", {facts['vocab_size']:,} rows" if isinstance(facts["vocab_size"], int) else ""
    tokens = f"{found.vocabulary:,} tokens{rows}" if found.vocabulary else "not readable as a table" if found.files else "none"
    table.add_row("tokenizer", tokens)
    if found.manifest:
        made = found.manifest
        recipe = made["recipe"]
        method = recipe.get("merge_method") or (recipe.get("merge") or {}).get("method", "average")
        how = f"whole models: {', '.join(made['models'])}" if found.expert_models else f"{method} of {', '.join(made['models'])}"
        how = f"tuned on {', '.join(made['tuning'])}" if "tuning" in made else how
        table.add_row("made by", f"moerge {made['versions']['moerge']}, {how}")
        if made["experts"]:
            table.add_row("experts", ", ".join(f"{index} {name}" for index, name in enumerate(made["experts"])))
    if found.experts:
        references = list(found.references.values())
        shown = references if len(references) <= _LISTED else [references[0], "...", references[-1]]
        table.add_row("experts as models", ", ".join(shown))
    show_table(table)
    roles = Table("role", "shape", "tensors", "parameters")
    for role in found.roles:
        roles.add_row(role.role, " x ".join(map(str, role.shape)), str(role.tensors), as_count(role.parameters))
    show_table(roles)
