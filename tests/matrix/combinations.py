"""The combinations of versions that are tried: which Python, what is installed, and what it has to do."""

from __future__ import annotations

from dataclasses import dataclass

TORCH = "torch==2.13.0"
CORE, GENERATION = "core.py", "generation.py"


@dataclass(frozen=True)
class Combination:
    """An environment of moerge with `extras` and `packages`, and the script that is run in it."""

    name: str
    check: str
    python: str = "3.11"
    extras: str = ""
    packages: tuple[str, ...] = ()
    resolution: str = "highest"
    constraints: bool = False
    """True for the versions of constraints.txt."""


def with_transformers(version: str, name: str = "") -> Combination:
    return Combination(name or f"transformers {version}", GENERATION, "3.11", "models", (TORCH, f"transformers=={version}"))


OLDEST = Combination("oldest core", CORE, resolution="lowest-direct")
QUICK = (OLDEST,)
ALL = (
    OLDEST,
    Combination("pinned core", CORE, constraints=True),
    *(Combination(f"newest core, Python {python}", CORE, python) for python in ("3.11", "3.12", "3.13", "3.14")),
    Combination("oldest typer, all else newest", CORE, packages=("typer==0.19.0",)),
    Combination("oldest models, core too", CORE, extras="models", packages=(TORCH,), resolution="lowest-direct"),
    *map(with_transformers, ("5.5.0", "5.9.0", "5.10.1", "5.12.1", "5.18.0", "5.23.0")),
    Combination("pinned models", GENERATION, extras="models", packages=(TORCH,), constraints=True),
    Combination("newest models", GENERATION, extras="models", packages=(TORCH,)),
)
