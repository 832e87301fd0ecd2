"""A store that turns merged matrices into FP8 on their way to the disk: codes of E4M3, and a scale for each block of 128 x 128.

As transformers' Fp8Quantize does it to a model in bfloat16: scale = 448 / largest magnitude, codes rounded to nearest even.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from moerge.checkpoint.staging import Staging
from moerge.operations.operations import Output
from moerge.tensors.codec import decode
from moerge.tensors.kernels import kernel
from moerge.tensors.minifloat import LARGEST_E4M3
from moerge.tensors.spec import TensorSpec

BLOCK = 128
"""Rows and columns of a block, as in DeepSeek-V3."""


@dataclass(frozen=True)
class Float8Pair:
    """The two stored tensors of a matrix."""

    codes: TensorSpec
    scales: TensorSpec


class Float8Store:
    """A Store: matrices in `pairs` become codes and scales in `staging`, 128 rows at a time; all else goes there as it is."""

    def __init__(self, staging: Staging, pairs: Mapping[str, Float8Pair]) -> None:
        self._staging, self._pairs = staging, pairs
        self._stripes: dict[tuple[str, int], _Stripe] = {}
        self._lock = threading.Lock()

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        """Elements `start` and following of an output; what is no complete stripe yet is kept until it is."""
        if output.name not in self._pairs:
            self._staging.write(output, start, data)
            return
        for number, stripe_N in self._completed(output, start, data):
            self._write_stripe(output, number, stripe_N)

    def _completed(self, output: Output, start: int, data: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        size, done = BLOCK * output.shape[1], 0
        while done < data.size:
            number, offset = divmod(start + done, size)
            part_N = data[done : done + size - offset]
            done += part_N.size
            with self._lock:
                stripe = self._stripes.setdefault((output.name, number), _Stripe(np.empty(size, output.dtype.storage), size))
                stripe.elements_N[offset : offset + part_N.size] = part_N
                stripe.missing -= part_N.size
                complete = stripe.missing == 0
                if complete:
                    del self._stripes[output.name, number]
            if complete:
                yield number, stripe.elements_N

    def _write_stripe(self, output: Output, number: int, stripe_N: np.ndarray) -> None:
        pair, columns = self._pairs[output.name], output.shape[1]
        values_N = np.empty(stripe_N.size, np.float32)
        decode(stripe_N, output.dtype, values_N)
        codes_RC, scales_J = np.empty((BLOCK, columns), np.uint8), np.empty(columns // BLOCK, np.float32)
        _quantize(values_N.reshape(BLOCK, columns), LARGEST_E4M3, codes_RC, scales_J)
        self._staging.write(pair.codes, number * codes_RC.size, codes_RC.reshape(-1))
        self._staging.write(pair.scales, number * scales_J.size, scales_J)

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        """An output is complete."""
        pair = self._pairs.get(output.name)
        if pair is None:
            self._staging.done(output, digest, inputs, nonfinite)
            return
        self._staging.done(pair.scales, self._staging.stored_digest(pair.scales), {}, [])
        self._staging.done(pair.codes, self._staging.stored_digest(pair.codes), inputs, nonfinite)

    def finished(self, output: Output) -> bool:
        """Return whether an earlier, interrupted run completed this output."""
        pair = self._pairs.get(output.name)
        if pair is None:
            return self._staging.finished(output)
        return self._staging.finished(pair.scales) and self._staging.finished(pair.codes)


@dataclass
class _Stripe:
    elements_N: np.ndarray
    missing: int


@kernel
def _quantize(values_RC: np.ndarray, largest: np.float32, codes_RC: np.ndarray, scales_J: np.ndarray) -> None:
    """The blocks of a stripe. Magnitudes below 2^-6 are subnormal: multiples of 2^-9."""
    for j in range(scales_J.size):
        block_RC = values_RC[:, j * BLOCK : (j + 1) * BLOCK]
        peak = np.abs(block_RC).max()
        scale = np.float32(1) / peak * largest if peak > 0 else np.float32(1)
        scales_J[j] = np.float32(1) / scale
        for r in range(block_RC.shape[0]):
            scaled_N = block_RC[r] * scale
            bits_N = scaled_N.view(np.uint32)
            for c in range(scaled_N.size):
                magnitude = bits_N[c] & np.uint32(0x7FFFFFFF)
                if magnitude < np.uint32(121 << 23):
                    code = np.uint32(np.rint(abs(scaled_N[c]) * np.float32(512)))
                else:
                    rounded = magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))
                    code = min((rounded >> np.uint32(20)) - np.uint32(120 << 3), np.uint32(0x7E))
                codes_RC[r, j * BLOCK + c] = code | ((bits_N[c] >> np.uint32(24)) & np.uint32(0x80))
