"""Facts about the installation: versions, extras, threads, GPUs, cache folders and the sandbox of generated code."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moerge.tensors.threads import default_threads

_CONTRIBUTORS = ("dev", "docs")
"""Extras that no user needs."""
_GPU_DEVICES = ("nvidia[0-9]*", "kfd", "dxg")
"""Device files of NVIDIA's and AMD's drivers, and of a GPU under WSL."""


@dataclass(frozen=True)
class Dependency:
    """A package that moerge or one of its extras needs; `installed` is its version, or None."""

    name: str
    wanted: str
    installed: str | None

    @property
    def met(self) -> bool:
        """True if a version that moerge allows is installed."""
        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


@dataclass(frozen=True)
class Extra:
    """An optional part of moerge and what it needs."""

    name: str
    dependencies: tuple[Dependency, ...]

    @property
    def missing(self) -> tuple[Dependency, ...]:
        """Dependencies that are absent or of a version that moerge does not allow."""
        return tuple(dependency for dependency in self.dependencies if not dependency.met)

    @property
    def command(self) -> str:
        """The command that installs it."""
        return f"pip install 'moerge[{self.name}]'"


@dataclass(frozen=True)
class Folder:
    """A cache folder; `free_bytes` of the file system that it is on, or would be made on."""

    path: str
    exists: bool
    writable: bool
    free_bytes: int


@dataclass(frozen=True)
class Diagnosis:
    """The state of an installation."""

    moerge: str
    python: str
    system: str
    core: Extra
    extras: tuple[Extra, ...]
    threads: int
    gpus: tuple[str, ...]
    gpu_note: str
    caches: Mapping[str, Folder | None]
    sandbox: str
    sandbox_note: str

    @property
    def healthy(self) -> bool:
        """True if all that merging needs is installed. Extras are optional."""
        return not self.core.missing

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as JSON values."""
        facts = asdict(self)
        facts["core"] = [asdict(dependency) for dependency in self.core.dependencies]
        facts["extras"] = {
            extra.name: {
                "complete": not extra.missing,
                "missing": [dependency.name + dependency.wanted for dependency in extra.missing],
                "install": extra.command,
                "packages": [asdict(dependency) for dependency in extra.dependencies],
            }
            for extra in self.extras
        }
        return {**facts, "healthy": self.healthy}


def diagnose() -> Diagnosis:
    """Look at this installation. It imports torch only where the machine shows a GPU."""
    gpus, gpu_note = _gpus()
    sandbox, sandbox_note = _sandbox()
    names = [name for name in metadata("moerge").get_all("Provides-Extra") or () if name not in _CONTRIBUTORS]
    return Diagnosis(
        moerge=version("moerge"),
        python=f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})",
        system=platform.platform(),
        core=Extra("", tuple(_dependencies(""))),
        extras=tuple(Extra(name, tuple(_dependencies(name))) for name in names),
        threads=default_threads(),
        gpus=gpus,
        gpu_note=gpu_note,
        caches={name: _folder(path) if path else None for name, path in (("hub", _hub_cache()), ("kernels", _kernel_cache()))},
        sandbox=sandbox,
        sandbox_note=sandbox_note,
    )


def _dependencies(extra: str) -> list[Dependency]:
    """Return the packages that moerge's own metadata lists for an extra, or for the core where `extra` is empty."""
    wanted: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, requires("moerge") or ()):
        marker = requirement.marker
        if (marker is None or marker.evaluate({"extra": extra})) and not (
            extra and (marker is None or marker.evaluate({"extra": ""}))
        ):
            wanted[requirement.name] = wanted.get(requirement.name, SpecifierSet()) & requirement.specifier
    return [Dependency(name, str(specifier), _version(name)) for name, specifier in wanted.items()]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> tuple[tuple[str, ...], str]:
    """The GPUs that torch can use, and a note where there are none."""
    if sys.platform == "linux" and not any(list(Path("/dev").glob(pattern)) for pattern in _GPU_DEVICES):
        return (), "the system shows no GPU"
    try:
        import torch
    except ImportError:
        return (), "torch is not installed, so none can be used"
    if torch.cuda.is_available():
        return tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())), ""
    return (), f"torch {torch.__version__} finds none that it can use"


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _kernel_cache() -> Path | None:
    """The folder of Numba's compiled kernels; None where no folder can be written, so that each process compiles them again."""
    from moerge.tensors.codec import _encode_bf16

    path = _encode_bf16.compiled.stats.cache_path  # type: ignore[attr-defined]
    return Path(path) if path else None


def _folder(path: Path) -> Folder:
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    return Folder(str(path), path.is_dir(), os.access(nearest, os.W_OK), shutil.disk_usage(nearest).free)


def _sandbox() -> tuple[str, str]:
    """The kind of wall around generated code, and a sentence about it."""
    if find_spec("resource") is None:
        return "none", "this system cannot limit generated code: evaluate code on Linux"
    from moerge.evaluation import sandbox

    return sandbox.wall(), sandbox.describe_wall()
