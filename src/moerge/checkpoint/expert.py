"""An expert of a native mixture as a model, `path#math` or `hub-id#3`: views of the mixture's tensors; none is ever written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moerge.architecture.config import normalized_config
from moerge.architecture.family import Family
from moerge.architecture.mixture import Piece, expert_count, expert_layout
from moerge.architecture.stored import stored_family, unwrapped
from moerge.checkpoint.manifest import read_manifest
from moerge.checkpoint.reader import Checkpoint
from moerge.checkpoint.staging import STATISTICS
from moerge.errors import InputError, suggest
from moerge.tensors.tensor import Tensor
from moerge.tensors.views.span import SpanTensor

SEPARATOR = "#"
"""Between a mixture and the name or number of one of its experts."""
_SHOWN = 8


@dataclass(frozen=True)
class ExpertCheckpoint(Checkpoint):
    """Expert `number` of `mixture`. `rows` are its rows of the router's tensors, by role."""

    mixture: Checkpoint = field(kw_only=True, repr=False)
    number: int = field(kw_only=True)
    rows: Mapping[str, Tensor] = field(kw_only=True, repr=False)

    @property
    def origins(self) -> tuple[Checkpoint, ...]:
        """The mixture."""
        return (self.mixture,)

    @property
    def expert(self) -> str:
        """The expert's name in the mixture, or its number where it has none."""
        return expert_labels(self.mixture)[self.number]

    @property
    def statistics(self) -> Path:
        """The file that has what the mixture's router was computed from, of this expert; it need not exist."""
        return self.folder / STATISTICS / f"{Path(self.expert).name}.safetensors"

    @property
    def family(self) -> Family:
        """The mixture's family."""
        family = mixture_tensors(self.mixture)[0]
        assert family is not None
        return family

    @property
    def mixture_config(self) -> dict[str, Any]:
        """The mixture's config in its normal form."""
        return normalized_config(self.mixture.config, self.family)


def split_reference(location: str, folder: Path) -> tuple[str, str | None]:
    """A model's location and the expert of it that is meant, if one is; a folder whose own name has a '#' is a folder."""
    model, separator, expert = location.rpartition(SEPARATOR)
    if not separator or not model or (folder / Path(location).expanduser()).exists():
        return location, None
    return model, expert


def mixture_tensors(mixture: Checkpoint) -> tuple[Family | None, dict[str, Tensor]]:
    """A checkpoint's family, and its tensors under the names that the family's table has."""
    plain = unwrapped(mixture.tensors)
    family = stored_family(mixture.config, plain.values())
    canonical = family.canonical_name if family else str
    return family, {canonical(name): mixture.tensors[stored] for stored, name in plain.items()}


def expert_labels(mixture: Checkpoint) -> tuple[str, ...]:
    """The experts of a native mixture in order: by name where moerge built it, by number elsewhere; none if it is no mixture."""
    count = expert_count(mixture_tensors(mixture)[0], mixture.config)
    names = [str(name) for name in (read_manifest(mixture.folder) or {}).get("experts", ())]
    return tuple(names) if names and len(names) == count else tuple(map(str, range(count)))


def expert_of(mixture: Checkpoint, expert: str, location: str, dense_types: tuple[str, ...] = ()) -> ExpertCheckpoint:
    """An expert of a mixture as a model; no tensor is read.

    Args:
        mixture: A checkpoint of a native mixture.
        expert: The expert's name, or its number from 0.
        location: The whole reference, as the recipe writes it.
        dense_types: Dense model types to prefer where several fit.

    Returns:
        The dense model of the mixture's backbone and that expert, or where none computes the same a mixture of that expert alone.

    Raises:
        InputError: The model is no native mixture, has no such expert, or its config is damaged.
    """
    where = f"{f'{mixture.name}: ' if mixture.name else ''}{location}"
    number = _number(mixture, expert, where)
    family, tensors = mixture_tensors(mixture)
    assert family is not None
    manifest = read_manifest(mixture.folder) or {}
    built = any(operation.get("action") == "zeros" for operation in manifest.get("operations", ()))
    try:
        layout = expert_layout(family, mixture.config, number, dense_types=dense_types, built=built)
    except ValueError as error:
        raise InputError(f"{where}: config.json: {error}") from None

    def view(piece: Piece) -> Tensor:
        stored, shape = tensors[piece.stored], piece.shape
        if stored.size < piece.start + SpanTensor(piece.name, shape, stored).size:
            raise InputError(f"{where}: tensor {piece.stored!r} has shape {list(stored.shape)}, too small for {piece.name!r}")
        return SpanTensor(piece.name, shape, stored, piece.start)

    pieces = {piece.name: view(piece) for piece in layout.pieces if piece.stored in tensors}
    rows = {role: view(piece) for role, piece in layout.rows.items() if piece.stored in tensors}
    return ExpertCheckpoint(
        mixture.name,
        location,
        mixture.folder,
        layout.config,
        pieces,
        mixture.revision,
        mixture.complete,
        mixture.warnings,
        mixture.notes,
        mixture=mixture,
        number=number,
        rows=rows,
    )


def _number(mixture: Checkpoint, expert: str, where: str) -> int:
    labels = expert_labels(mixture)
    if not labels:
        raise InputError(
            f"{where}: {mixture.folder} is of type {mixture.model_type!r}, no native mixture that moerge knows, so it has no "
            f"experts to name: remove '{SEPARATOR}{expert}'",
            code="not-found",
        )
    if expert in labels:
        return labels.index(expert)
    if expert.isdecimal() and int(expert) < len(labels):
        return int(expert)
    known = suggest(expert, labels) if not labels[0].isdecimal() else f"its experts are 0 to {len(labels) - 1}"
    raise InputError(f"{where}: the mixture has no expert {expert!r}: {known}", code="unknown-name")
