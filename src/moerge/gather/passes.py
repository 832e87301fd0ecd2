"""The number of passes over the text that fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moerge import system

_SHARE = 0.8
"""The share of free memory for sums; the rest is for activations."""


def passes_within(sizes: Mapping[str, int], passes: int | None, free: int) -> list[list[str]]:
    """Sums, by name with their bytes, in groups for one pass each: `passes` of each kind, or as few as fit into `free` bytes.

    A group holds one kind of statistic and is never empty, so there may be fewer than asked for, and one that does not fit.
    """
    groups = []
    for prefix in ("gram:", "fisher:"):
        kind = {name: size for name, size in sizes.items() if name.startswith(prefix)}
        groups += _fitting(kind, _SHARE * free) if passes is None else _even(kind, passes)
    return groups


def _fitting(sizes: Mapping[str, int], limit: float) -> list[list[str]]:
    groups: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _even(sizes: Mapping[str, int], count: int) -> list[list[str]]:
    groups: list[list[str]] = [[] for _ in range(count)]
    total, before = sum(sizes.values()), 0
    for name, size in sizes.items():
        groups[(2 * before + size) * count // (2 * total)].append(name)
        before += size
    return [group for group in groups if group]


def free_memory(device: Any) -> int:
    """Bytes that are free on the device that a model is on."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return system.free_memory()
