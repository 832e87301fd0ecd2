"""The compilation of every kernel: without the GIL, cached on disk, and with no freedom to reorder floating point.

Without `fastmath` LLVM neither reassociates sums nor fuses multiply and add, so a kernel gives the same bits on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

STRIP = 1 << 12
"""Elements that a kernel with memory of its own works on at a time: it stays in the first-level cache, and small allocations
are reused where large ones would be returned to the system and faulted in again."""

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile `function` with Numba on its first call."""
    try:
        return cast(Function, numba.njit(nogil=True, error_model="numpy", cache=True)(function))
    except RuntimeError:  # neither the package's folder nor a cache folder can be written
        return cast(Function, numba.njit(nogil=True, error_model="numpy")(function))
