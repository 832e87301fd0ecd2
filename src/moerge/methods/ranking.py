"""Order by magnitude, of what is in memory."""

from __future__ import annotations

import numpy as np

from moerge.tensors.kernels import kernel

_MAGNITUDE = np.uint32(0x7FFFFFFF)
_DIGIT_BITS, _DIGITS = np.uint32(11), 3
_BINS = 1 << 11


@kernel
def magnitude_order(tau_N: np.ndarray, order_N: np.ndarray, spare_N: np.ndarray) -> None:
    """Write the indices of entries by rising magnitude, equal ones in order, to `order_N`: a radix sort. All uint32."""
    bits_N = tau_N.view(np.uint32)
    counts = np.empty(_BINS, np.int64)
    for i in range(order_N.size):
        order_N[i] = i
    for digit in range(_DIGITS):
        shift = np.uint32(digit) * _DIGIT_BITS
        counts[:] = 0
        for i in range(bits_N.size):
            counts[((bits_N[i] & _MAGNITUDE) >> shift) & np.uint32(_BINS - 1)] += 1
        if counts.max() == bits_N.size:  # as with the low digits of what was stored as bfloat16
            continue
        total = 0
        for value in range(_BINS):
            total, counts[value] = total + counts[value], total
        for i in range(order_N.size):
            value = ((bits_N[order_N[i]] & _MAGNITUDE) >> shift) & np.uint32(_BINS - 1)
            spare_N[counts[value]] = order_N[i]
            counts[value] += 1
        order_N[:] = spare_N
