"""The compilation of every kernel: without the GIL, cached on disk, and with no freedom to reorder floating point.

Without `fastmath` LLVM neither reassociates sums nor fuses multiply and add, so a kernel gives the same bits on every CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import cached_property, update_wrapper
from types import CodeType, FunctionType
from typing import Any, Generic, TypeVar, cast

STRIP = 1 << 12
"""Elements that a kernel with memory of its own works on at a time: it stays in the first-level cache, and small allocations
are reused where large ones would be returned to the system and faulted in again."""

Function = TypeVar("Function", bound=Callable[..., Any])
_compiling = threading.RLock()


def kernel(function: Function) -> Function:
    """Compile `function` with Numba on its first call; importing it costs nothing."""
    return cast(Function, _Kernel(function))


class _Kernel(Generic[Function]):
    """A function, compiled when it is first called. Other kernels that it calls are compiled with it."""

    def __init__(self, function: Function) -> None:
        self._function = function
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The function as Numba compiles it."""
        import numba

        with _compiling:
            function = self._with_compiled_callees()
            try:
                return numba.njit(nogil=True, error_model="numpy", cache=True)(function)
            except RuntimeError:  # neither the package's folder nor a cache folder can be written
                return numba.njit(nogil=True, error_model="numpy")(function)

    def _with_compiled_callees(self) -> FunctionType:
        function = cast(FunctionType, self._function)
        named = {name: function.__globals__.get(name) for name in _names(function.__code__)}
        callees = {name: value.compiled for name, value in named.items() if isinstance(value, _Kernel)}
        if not callees:
            return function
        linked = FunctionType(
            function.__code__, {**function.__globals__, **callees}, function.__name__, function.__defaults__, function.__closure__
        )
        update_wrapper(linked, function)
        return linked


def _names(code: CodeType) -> Iterator[str]:
    """The global names in a function and in those inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
