"""Random numbers that are pure functions of (seed, names, index): the same whatever the threads, shards, order or machine.

The generator is SplitMix64 (Steele, Lea and Flood 2014) used by position: output j of the stream with key s is
mix(s + (j + 1) * gamma). Element i takes one 32-bit half of output i // 2.
"""

from __future__ import annotations

import hashlib

import numpy as np

from moerge.tensors.kernels import STRIP, kernel

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S30, _S27, _S31, _S32 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


def stream_key(seed: int, *names: str) -> np.uint64:
    """The 64-bit key of the stream that belongs to a seed and names."""
    text = "\0".join([str(seed), *names]).encode()
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))


def drop(tau_EN: np.ndarray, keys_E: np.ndarray, start: int, density: float, factor: np.float32) -> None:
    """Keep each entry with probability `density` and multiply it by `factor`; set the others to zero, in place.

    `start` is the index of the first column in its tensor and must be even.
    """
    assert start % 2 == 0
    _drop(tau_EN, keys_E, np.uint64(start // 2), np.uint64(round(density * 2**32)), factor)


def drop_each(tau_N: np.ndarray, key: np.uint64, start: int, kept_N: np.ndarray, rescale: bool) -> None:
    """Keep each entry with its own probability `kept_N`, divided by it if `rescale`; set the others to zero, in place.

    `start` is the index of the first entry in its tensor. The same entry draws the same number as in `drop`.
    """
    _drop_each(tau_N, np.uint64(key), start, kept_N, rescale)


def uniform(key: np.uint64, start: int, count: int) -> np.ndarray:
    """Elements start .. start + count of a stream as float32 in [-1, 1)."""
    assert start % 2 == 0
    out_N = np.empty(count, np.float32)
    _uniform(np.uint64(key), np.uint64(start // 2), out_N)
    return out_N


def normal(key: np.uint64, start: int, out_N: np.ndarray) -> None:
    """Fill `out_N` with elements `start` and following of a standard normal stream (Box and Muller 1958), as float32.

    `start` must be even. The pair of elements 2j and 2j + 1 comes from the two halves of output j.
    """
    assert start % 2 == 0
    _normal(np.uint64(key), np.uint64(start // 2), out_N)


@kernel
def splitmix64(key: np.uint64, position: np.uint64) -> np.uint64:
    """Output number `position` of the stream with this key."""
    z = key + (position + np.uint64(1)) * _GAMMA
    z = (z ^ (z >> _S30)) * _MIX_1
    z = (z ^ (z >> _S27)) * _MIX_2
    return z ^ (z >> _S31)


@kernel
def _drop(tau_EN: np.ndarray, keys_E: np.ndarray, first: np.uint64, threshold: np.uint64, factor: np.float32) -> None:
    bits = np.empty(STRIP // 2, np.uint64)
    halves = bits.view(np.uint32)
    for k in range(len(keys_E)):
        for start in range(0, tau_EN.shape[1], STRIP):
            strip = tau_EN[k, start : start + STRIP]
            position = first + np.uint64(start // 2)
            for j in range(bits.size):
                bits[j] = splitmix64(keys_E[k], position + np.uint64(j))
            for i in range(strip.size):
                kept = np.uint64(halves[i]) < threshold
                strip[i] = strip[i] * factor if kept else np.float32(0)


@kernel
def _drop_each(tau_N: np.ndarray, key: np.uint64, start: int, kept_N: np.ndarray, rescale: bool) -> None:
    for i in range(tau_N.size):
        bits = splitmix64(key, np.uint64((start + i) // 2))
        half = (bits >> _S32) if (start + i) % 2 else (bits & _LOW)
        if np.float64(half) < np.rint(kept_N[i] * 4294967296.0):
            tau_N[i] = np.float32(tau_N[i] / kept_N[i]) if rescale else tau_N[i]
        else:
            tau_N[i] = np.float32(0)


@kernel
def _uniform(key: np.uint64, first: np.uint64, out_N: np.ndarray) -> None:
    for i in range(out_N.size):
        bits = splitmix64(key, first + np.uint64(i // 2))
        half = (bits >> _S32) if i % 2 else (bits & _LOW)
        out_N[i] = np.float32(np.int64(half >> np.uint64(8)) - (1 << 23)) / np.float32(1 << 23)


@kernel
def _normal(key: np.uint64, first: np.uint64, out_N: np.ndarray) -> None:
    for i in range(0, out_N.size, 2):
        bits = splitmix64(key, first + np.uint64(i // 2))
        share = (np.float64(bits >> _S32) + 0.5) / 4294967296.0
        angle = 2 * np.pi * np.float64(bits & _LOW) / 4294967296.0
        radius = np.sqrt(-2 * np.log(share))
        out_N[i] = np.float32(radius * np.cos(angle))
        if i + 1 < out_N.size:
            out_N[i + 1] = np.float32(radius * np.sin(angle))
