"""Between stored bits and float32. A bfloat16 is the upper half of a float32, so decoding it is a shift."""

from __future__ import annotations

import numpy as np

from moerge.tensors.dtypes import BF16, F16, F32, F64, DType
from moerge.tensors.kernels import kernel

_EXPONENT = np.uint32(0x7F800000)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_QUIET = np.uint32(0x00400000)


def decode(stored_N: np.ndarray, dtype: DType, out_N: np.ndarray, base_N: np.ndarray | None = None) -> bool:
    """Write stored elements to `out_N` as float32, less `base_N` if that is given; True if all of them are finite."""
    if dtype is BF16:
        if base_N is None:
            return not _decode_bf16(stored_N, out_N.view(np.uint32))
        return not _decode_bf16_difference(stored_N, base_N, out_N)
    if dtype is F32:
        np.copyto(out_N, stored_N)
    elif dtype is F16:
        np.copyto(out_N, stored_N, casting="safe")
    elif dtype is F64:
        with np.errstate(over="ignore"):
            np.copyto(out_N, stored_N, casting="same_kind")
    else:
        raise AssertionError(f"{dtype.name} is not a float type")
    finite = not _any_nonfinite(out_N.view(np.uint32))
    if base_N is not None:
        np.subtract(out_N, base_N, out=out_N)
    return finite


def encode(value_N: np.ndarray, dtype: DType, out_N: np.ndarray) -> None:
    """Round float32 to the nearest storable value, ties to even; what overflows becomes infinite."""
    if dtype is BF16:
        _encode_bf16(value_N.view(np.uint32), out_N)
        return
    with np.errstate(over="ignore"):
        np.copyto(out_N, value_N, casting="same_kind")


def all_finite(stored_N: np.ndarray, dtype: DType) -> bool:
    """Return whether stored elements hold neither NaN nor infinity; True for types that have none."""
    if dtype is BF16:
        return not _any_nonfinite_bf16(stored_N)
    if dtype is F32:
        return not _any_nonfinite(stored_N.view(np.uint32))
    return not dtype.is_float or bool(np.isfinite(stored_N).all())


@kernel
def _decode_bf16(stored_N: np.ndarray, out_N: np.ndarray) -> np.uint32:
    nonfinite = np.uint32(0)
    for i in range(stored_N.size):
        bits = np.uint32(stored_N[i]) << np.uint32(16)
        out_N[i] = bits
        nonfinite |= np.uint32((bits & _EXPONENT) == _EXPONENT)
    return nonfinite


@kernel
def _decode_bf16_difference(stored_N: np.ndarray, base_N: np.ndarray, out_N: np.ndarray) -> np.uint32:
    nonfinite = np.uint32(0)
    bits_N = out_N.view(np.uint32)
    for i in range(stored_N.size):
        bits = np.uint32(stored_N[i]) << np.uint32(16)
        bits_N[i] = bits
        out_N[i] -= base_N[i]
        nonfinite |= np.uint32((bits & _EXPONENT) == _EXPONENT)
    return nonfinite


@kernel
def _encode_bf16(bits_N: np.ndarray, out_N: np.ndarray) -> None:
    for i in range(bits_N.size):
        bits = bits_N[i]
        rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        is_nan = (bits & _MAGNITUDE) > _EXPONENT
        out_N[i] = np.uint16((bits | _QUIET if is_nan else rounded) >> np.uint32(16))


@kernel
def _any_nonfinite(bits_N: np.ndarray) -> np.uint32:
    nonfinite = np.uint32(0)
    for i in range(bits_N.size):
        nonfinite |= np.uint32((bits_N[i] & _EXPONENT) == _EXPONENT)
    return nonfinite


@kernel
def _any_nonfinite_bf16(stored_N: np.ndarray) -> np.uint16:
    nonfinite = np.uint16(0)
    for i in range(stored_N.size):
        nonfinite |= np.uint16((stored_N[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return nonfinite
