"""Results of an extraction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moerge.formatting import Displayed


@dataclass
class Kept:
    """Squared Frobenius norms of task vectors, added up: `total`, and what is lost of it. `kind` as in `Target`."""

    role: str
    kind: str
    tensors: int = 0
    total: float = 0.0
    lost: float = 0.0
    ranks: tuple[int, int] | None = None

    @property
    def share(self) -> float:
        """The fraction of the squared norm that is kept; 1 where there was nothing."""
        return 1 - self.lost / self.total if self.total else 1.0

    def add(self, total: float, lost: float, rank: int | None) -> None:
        """One more tensor."""
        self.tensors += 1
        self.total += total
        self.lost += lost
        if rank is not None:
            low, high = self.ranks or (rank, rank)
            self.ranks = min(low, rank), max(high, rank)


@dataclass(frozen=True, repr=False)
class Extraction(Displayed):
    """A finished extraction. Shares are fractions of the task vector's squared Frobenius norm.

    `base` is as peft looks for it, `revision` its commit if it came from the Hub.
    """

    folder: Path
    base: str
    expert: str
    parameters: int
    nbytes: int
    rank: int
    roles: tuple[Kept, ...]
    seconds: float
    warnings: tuple[str, ...] = ()
    revision: str | None = None

    @property
    def total(self) -> float:
        """The whole task vector's squared norm."""
        return sum(role.total for role in self.roles)

    @property
    def share(self) -> float:
        """Return the fraction of it that base plus adapter has."""
        return _share(self.roles)

    @property
    def share_of_modules(self) -> float:
        """Return the fraction for the low-rank tensors alone."""
        return _share(role for role in self.roles if role.kind in ("lora", "embedding"))

    def part(self, role: Kept) -> float:
        """A role's part of the whole task vector."""
        return role.total / self.total if self.total else 0.0

    def to_json(self) -> dict[str, Any]:
        """Figures for `--json`."""
        return {
            "adapter": str(self.folder),
            "base": self.base,
            "expert": self.expert,
            "parameters": self.parameters,
            "bytes": self.nbytes,
            "rank": self.rank,
            "share_kept": self.share,
            "share_kept_of_modules": self.share_of_modules,
            "roles": [
                {
                    "role": role.role,
                    "stored": role.kind,
                    "tensors": role.tensors,
                    "ranks": list(role.ranks) if role.ranks else None,
                    "share_of_task_vector": self.part(role),
                    "share_kept": role.share,
                }
                for role in self.roles
            ],
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


def _share(roles: Iterable[Kept]) -> float:
    found = list(roles)
    total = sum(role.total for role in found)
    return 1 - sum(role.lost for role in found) / total if total else 1.0
