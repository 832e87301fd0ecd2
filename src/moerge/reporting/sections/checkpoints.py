"""The checkpoints: what was merged from what, how, and how large it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

from moerge.formatting import as_size, listed, plural, short_names
from moerge.reporting.blocks import Block, Cell, Code, Column, Facts, Fold, Heading, Listing, Section, Table, Text, count, words
from moerge.reporting.data import Checkpoint, Collected


def checkpoints(found: Collected) -> Section | None:
    """Each checkpoint with its recipe, operations, inputs, calibration texts and warnings."""
    if not found.checkpoints:
        return None
    names = short_names([checkpoint.folder for checkpoint in found.checkpoints])
    blocks: list[Block] = [_overview(found, names)] if len(found.checkpoints) > 1 else []
    opened = len(found.checkpoints) == 1
    for checkpoint in found.checkpoints:
        parts = list(_checkpoint(checkpoint))
        name = found.folder if checkpoint.folder == "." else names[checkpoint.folder]
        blocks += [Heading(name), *parts] if opened else [Fold(name, parts, _kind(checkpoint))]
    warned = [names[checkpoint.folder] for checkpoint in found.checkpoints if checkpoint.warnings]
    glance = [f"{plural(len(found.checkpoints), 'merged checkpoint')}, the largest with {_largest(found):,} parameters."]
    glance += [f"The merge warned about {listed([f'`{name}`' for name in warned])}: see there."] if warned else []
    return Section("checkpoints", "What was merged", blocks, glance)


def _largest(found: Collected) -> int:
    return max(checkpoint.parameters for checkpoint in found.checkpoints)


def _overview(found: Collected, names: dict[str, str]) -> Table:
    columns = [Column("checkpoint"), Column("result"), Column("method"), Column("router"), Column("inputs", numeric=True)]
    columns += [Column("parameters", numeric=True), Column("size", "MB", numeric=True)]
    rows = [
        [
            words(found.folder if checkpoint.folder == "." else names[checkpoint.folder]),
            words(_kind(checkpoint)),
            words(_method(checkpoint)),
            words(_router(checkpoint)),
            count(len(checkpoint.models)),
            count(checkpoint.parameters),
            Cell(f"{checkpoint.bytes / 1e6:,.2f}", checkpoint.bytes),
        ]
        for checkpoint in found.checkpoints
    ]
    return Table("The merged checkpoints", columns, rows)


def _section(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    held = checkpoint.recipe.get(name)
    return held if isinstance(held, dict) else {}


def _method(checkpoint: Checkpoint) -> str:
    if checkpoint.tuning is not None:
        return "tuned"
    return str(checkpoint.recipe.get("merge_method") or _section(checkpoint, "merge").get("method") or "average")


def _router(checkpoint: Checkpoint) -> str:
    if not checkpoint.experts:
        return "–"
    router = _section(checkpoint, "moe").get("router")
    kind = (checkpoint.routing or {}).get("kind") or (router.get("kind") if isinstance(router, dict) else router)
    return str(kind or "random")


def _kind(checkpoint: Checkpoint) -> str:
    if not checkpoint.experts:
        return "dense"
    return f"{'sequence' if checkpoint.routing else 'token'}-routed, {plural(len(checkpoint.experts), 'expert')}"


def _checkpoint(checkpoint: Checkpoint) -> Iterator[Block]:
    yield Facts(
        [
            ("folder", f"`{checkpoint.folder}`"),
            ("model type", checkpoint.model_type),
            ("parameters", f"{checkpoint.parameters:,} ({as_size(checkpoint.bytes)})"),
            ("stored as", ", ".join(f"{name} {plural(number, 'parameter')}" for name, number in checkpoint.dtypes.items())),
            ("layers, width", f"{checkpoint.layers}, {checkpoint.hidden_size}"),
            *(
                [("experts by index", ", ".join(f"{i} {name}" for i, name in enumerate(checkpoint.experts)))]
                * bool(checkpoint.experts)
            ),
            *(
                [("routing", ", ".join(f"{key} {value}" for key, value in checkpoint.routing.items()))]
                if checkpoint.routing
                else []
            ),
            ("made by", ", ".join(f"{name} {number}" for name, number in checkpoint.versions.items())),
            ("written", f"{checkpoint.written} UTC"),
        ]
    )
    if checkpoint.warnings:
        yield Text("The merge warned:", "warning")
        yield Listing(checkpoint.warnings)
    yield _operations(checkpoint)
    yield _inputs(checkpoint)
    if checkpoint.calibration:
        yield _calibration(checkpoint)
    yield Fold(
        "Recipe", [Code(yaml.safe_dump(dict(checkpoint.recipe), sort_keys=False, allow_unicode=True), "The recipe, as YAML")]
    )
    yield Fold("Tensors by role", [_roles(checkpoint)])


def _operations(checkpoint: Checkpoint) -> Block:
    if checkpoint.operations is None:
        return Text("Its manifest is older than the list of operations: `moerge plan` prints it for the recipe.", "note")
    columns = [Column("operation"), Column("tensors", numeric=True), Column("written", "bytes", numeric=True), Column("settings")]
    rows = [
        [words(group.action), count(group.tensors), count(group.bytes), words(group.hyperparameters or "–")]
        for group in checkpoint.operations
    ]
    return Table("What was done", columns, rows)


def _inputs(checkpoint: Checkpoint) -> Table:
    columns = [Column("model"), Column("location"), Column("revision"), Column("tensors read", numeric=True), Column("digest")]
    rows = [
        [words(name), words(model.location), words(model.revision or "local"), count(model.tensors_read), words(model.digest)]
        for name, model in checkpoint.models.items()
    ]
    return Table("What went in", columns, rows, "The digest is XXH3-128 over the tensors that were read.")


def _calibration(checkpoint: Checkpoint) -> Table:
    columns = [Column("expert"), Column("text"), Column("documents", numeric=True), Column("digest")]
    rows = [
        [words(name), words(text.location), count(text.documents), words(text.digest)]
        for name, text in checkpoint.calibration.items()
    ]
    note = "What this checkpoint was fitted to, so it must not be evaluated on it. `moerge route` and `moerge eval` check that."
    return Table("Calibration texts", columns, rows, note)


def _roles(checkpoint: Checkpoint) -> Table:
    columns = [Column("role"), Column("shape of the first"), Column("tensors", numeric=True), Column("parameters", numeric=True)]
    rows = [
        [words(role.role), words(" × ".join(map(str, role.shape))), count(role.tensors), count(role.parameters)]
        for role in checkpoint.roles
    ]
    return Table("Tensors by role", columns, rows)
