"""Floats of eight and four bits as tables of float32, and the scales that stand beside such codes.

E4M3 and E5M2: Micikevicius et al. 2022, "FP8 Formats for Deep Learning". E2M1 and E8M0: OCP Microscaling Formats 1.0.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from moerge.tensors.codec import decode
from moerge.tensors.dtypes import DType
from moerge.tensors.tensor import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""The values of the sixteen codes of four bits."""
LARGEST_E4M3 = np.float32(448)


@cache
def table_of(dtype: str) -> np.ndarray:
    """The values of the 256 codes of an element type of eight bits, by its name in safetensors; of U8 as of F8_E8M0."""
    codes_N = np.arange(256)
    if dtype in ("F8_E8M0", "U8"):
        return np.append(np.exp2(codes_N[:255] - 127.0), np.nan).astype(np.float32)
    mantissa_bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[dtype]
    exponent_N, mantissa_N = (codes_N & 127) >> mantissa_bits, codes_N & (2**mantissa_bits - 1)
    fraction_N = mantissa_N / 2.0**mantissa_bits + (exponent_N > 0)
    value_N = np.exp2(np.maximum(exponent_N, 1) - bias) * fraction_N
    if dtype == "F8_E5M2":
        value_N = np.where(exponent_N == 31, np.where(mantissa_N > 0, np.nan, np.inf), value_N)
    else:
        value_N = np.where(codes_N & 127 == 127, np.nan, value_N)
    return np.where(codes_N & 128, -value_N, value_N).astype(np.float32)


def read_scales(tensor: Tensor, start: int, stop: int) -> np.ndarray:
    """Elements start .. stop of a tensor of scales as float32. A byte is the exponent of a power of two, from 2^-127 on."""
    stored_N = tensor.open().read(start, np.empty(stop - start, tensor.dtype.storage))
    if not tensor.dtype.is_float:
        scales_N: np.ndarray = table_of(tensor.dtype.name)[stored_N]
        return scales_N
    values_N = np.empty(stop - start, np.float32)
    decode(stored_N, tensor.dtype, values_N)
    return values_N


def holds_scales(dtype: DType) -> bool:
    """Return whether `read_scales` reads tensors of this type."""
    return dtype.is_float or dtype.name in ("F8_E8M0", "U8", "F8_E4M3", "F8_E5M2")
