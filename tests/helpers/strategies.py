"""What hypothesis draws: tensors of one to a few experts, with all that trips numerical code."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

GRID = 1 / 64
"""Multiples of this below 2**10 stay exact in float32 through differences, small sums and products with powers of two."""


def bfloat16(value_N: np.ndarray) -> np.ndarray:
    """float32 values cut to what a bfloat16 holds."""
    return (np.ascontiguousarray(value_N, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def floats32() -> st.SearchStrategy[float]:
    """Zeros of both signs, denormals, and magnitudes up to 1e4."""
    return st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]),
        st.floats(-1e4, 1e4, width=32),
        st.floats(-1, 1, width=32),
        st.floats(-(2**-126), 2**-126, width=32),
    )


def grid_values() -> st.SearchStrategy[float]:
    """Few enough that equal magnitudes and cancelling signs are common."""
    return st.integers(-512, 512).map(lambda steps: steps * GRID)


def arrays(shape: tuple[int, ...], elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return npst.arrays(np.float32, shape, elements=elements, fill=st.nothing())


@st.composite
def stacks(draw: st.DrawFn, *, rows: int | None = None, exact: bool = False, max_size: int = 24) -> np.ndarray:
    """float32 [rows, N]: rows of one size; all zero, all equal, bfloat16-quantised, or mixed. `exact` keeps to the grid."""
    count = rows if rows is not None else draw(st.integers(1, 4))
    size = draw(st.one_of(st.just(1), st.integers(1, max_size)))
    elements = grid_values() if exact else floats32()
    kind = draw(st.sampled_from(["mixed", "mixed", "bfloat16", "zero rows", "equal rows"]))
    stack = draw(arrays((count, size), elements))
    if kind == "bfloat16":
        return bfloat16(stack)
    if kind in ("zero rows", "equal rows"):
        chosen = draw(npst.arrays(np.bool_, count))
        stack[chosen] = 0 if kind == "zero rows" else stack[chosen, :1]
    return stack


@st.composite
def models(draw: st.DrawFn, *, exact: bool = False) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """A base and one to four experts: flat tensors of one to three names."""
    count = draw(st.integers(1, 4))
    names = [f"layers.{i}.weight" for i in range(draw(st.integers(1, 3)))]
    drawn = {name: draw(stacks(rows=1 + count, exact=exact)) for name in names}
    base = {name: stack[0] for name, stack in drawn.items()}
    return base, [{name: stack[1 + k] for name, stack in drawn.items()} for k in range(count)]


def densities() -> st.SearchStrategy[float]:
    """In (0, 1]: those that people write, with two decimals, and any other."""
    return st.one_of(st.integers(1, 100).map(lambda n: n / 100), st.floats(1e-6, 1))


def scales() -> st.SearchStrategy[float]:
    return st.one_of(st.sampled_from([1 / 3, 1.0, 0.5, 0.0, -1.0]), st.floats(-2, 2))


def weights(count: int) -> st.SearchStrategy[list[float]]:
    """Of both signs; their sum is not near zero."""
    one = st.one_of(st.sampled_from([1.0, 0.5, 2.0, 0.0, -0.25]), st.floats(-1, 2, width=32))
    return st.lists(one, min_size=count, max_size=count).filter(lambda w: abs(sum(w)) > 0.05)


def columns(size: int) -> st.SearchStrategy[int]:
    """Row lengths that cut so many entries into complete rows."""
    return st.sampled_from([count for count in range(1, size + 1) if size % count == 0])
