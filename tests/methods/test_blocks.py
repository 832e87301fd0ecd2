"""What a method gives does not depend on how the executor cuts tensors, nor on threads, and is rounded once at the end."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

import moerge
from moerge.tensors.digest import CHUNK
from moerge.tensors.random import stream_key
from moerge.tensors.streams import BLOCK
from tests.helpers import reference
from tests.methods.one_tensor import assert_same_bits

METHODS: dict[str, dict[str, Any]] = {
    "average": {},
    "linear": {"weights": [0.3, 0.7]},
    "task_arithmetic": {"weights": [0.3, -0.7]},
    "ties": {"density": 0.3},
    "ties mean of the model": {"density": 0.3, "scope": "model", "aggregate": "mean"},
    "dare": {"density": 0.25},
    "dare with election": {"density": 0.25, "elect": "sign", "aggregate": "mean"},
    "slerp": {"t": 0.3},
}
SMALL = [1, 2, 15, 17, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7]
LARGE = [CHUNK - 1, CHUNK + 1, 2 * CHUNK + BLOCK + 3]


@cache
def random_stack(size: int) -> np.ndarray:
    stack = np.random.default_rng(size).standard_normal((3, size), dtype=np.float32)
    stack[1:] = stack[0] + np.float32(0.1) * stack[1:]
    stack.flags.writeable = False
    return stack


def merge(name: str, stack: np.ndarray, threads: int = 2) -> np.ndarray:
    base, experts = {"w": stack[0]}, [{"w": theta_N} for theta_N in stack[1:]]
    return moerge.merge_state_dicts(base, experts, method=name.split()[0], threads=threads, **METHODS[name])["w"]


def expected(name: str, stack: np.ndarray) -> np.ndarray:
    """The reference in float32, experts in order; slerp's in float64."""
    settings = dict(METHODS[name])
    weights = settings.pop("weights", [1, 1])
    base_N, theta_EN, method = stack[0], stack[1:], name.split()[0]
    if method == "average":
        return reference.average(theta_EN)
    if method == "linear":
        return reference.linear(theta_EN, weights)
    if method == "task_arithmetic":
        return reference.task_arithmetic(base_N, theta_EN, weights, scale=1 / 3)
    if method == "ties":
        experts = [{"w": theta_N} for theta_N in theta_EN]
        return reference.ties({"w": base_N}, experts, weights, scale=1 / 3, **settings)["w"]
    if method == "dare":
        return reference.dare(base_N, theta_EN, masks(base_N.size, settings["density"]), weights, scale=1 / 3, **settings)
    return reference.slerp(*theta_EN.astype(np.float64), settings["t"])


@cache
def masks(size: int, density: float) -> np.ndarray:
    keys = [int(stream_key(0, f"expert{k}", "w")) for k in range(2)]
    return np.stack([reference.dare_mask(key, size, density) for key in keys])


def check(name: str, size: int) -> None:
    stack = random_stack(size)
    merged_N = merge(name, stack)
    if name == "slerp":
        np.testing.assert_allclose(merged_N, expected(name, stack), rtol=0, atol=1e-6)
    else:
        assert_same_bits(merged_N, expected(name, stack))


@pytest.mark.parametrize("size", SMALL)
@pytest.mark.parametrize("name", METHODS)
def test_sizes_around_a_block_equal_the_reference(name: str, size: int) -> None:
    check(name, size)


@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("dare")])
def test_sizes_around_a_chunk_equal_the_reference(name: str, size: int) -> None:
    check(name, size)


def test_dare_beyond_a_chunk_equals_the_reference_around_the_boundary() -> None:
    size, edge = CHUNK + BLOCK + 5, 1000
    stack = random_stack(size)
    merged_N = merge("dare", stack)
    keys = [int(stream_key(0, f"expert{k}", "w")) for k in range(2)]
    skipped = [(key + (CHUNK - edge) // 2 * 0x9E3779B97F4A7C15) % 2**64 for key in keys]
    kept_EN = np.stack([reference.dare_mask(key, 2 * edge, 0.25) for key in skipped])
    part = stack[:, CHUNK - edge : CHUNK + edge]
    expected_N = reference.dare(part[0], part[1:], kept_EN, [1, 1], density=0.25, scale=1 / 3)
    assert_same_bits(merged_N[CHUNK - edge : CHUNK + edge], expected_N)


@pytest.mark.parametrize("name", METHODS)
def test_threads_change_no_bit(name: str) -> None:
    stack = random_stack(2 * CHUNK + BLOCK + 3)
    one_N = merge(name, stack, threads=1)
    for threads in (2, 5):
        assert_same_bits(merge(name, stack, threads=threads), one_N)


@pytest.mark.parametrize("name", METHODS)
def test_threads_change_no_bit_of_many_small_tensors(name: str) -> None:
    whole = random_stack(3 * BLOCK + 7)
    bounds = np.linspace(0, whole.shape[1], 40).astype(int)
    models = [{f"t{i}": theta_N[a:b] for i, (a, b) in enumerate(pairwise(bounds))} for theta_N in whole]

    def merged(threads: int) -> dict[str, np.ndarray]:
        return moerge.merge_state_dicts(models[0], models[1:], method=name.split()[0], threads=threads, **METHODS[name])

    one = merged(1)
    for threads in (2, 5):
        for tensor, array in merged(threads).items():
            assert_same_bits(array, one[tensor])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_half_types_are_the_float32_result_rounded_once(name: str, dtype: torch.dtype) -> None:
    stored = [torch.from_numpy(theta_N.copy()).to(dtype) for theta_N in random_stack(BLOCK + 1)]
    wide_N = merge(name, np.stack([theta.float().numpy() for theta in stored]))
    base, experts = {"w": stored[0]}, [{"w": theta} for theta in stored[1:]]
    merged = moerge.merge_state_dicts(base, experts, method=name.split()[0], threads=1, **METHODS[name])["w"]
    assert merged.dtype == dtype
    assert torch.equal(merged, torch.from_numpy(wide_N).to(dtype))


@pytest.mark.parametrize("name", METHODS)
def test_mixed_types_are_the_float32_result_in_the_leading_type(name: str) -> None:
    stack = random_stack(BLOCK + 1)
    types = [torch.bfloat16, torch.float32, torch.float16]
    stored = [torch.from_numpy(theta_N.copy()).to(dtype) for theta_N, dtype in zip(stack, types, strict=True)]
    wide_N = merge(name, np.stack([theta.float().numpy() for theta in stored]))
    experts = [{"w": theta} for theta in stored[1:]]
    merged = moerge.merge_state_dicts({"w": stored[0]}, experts, method=name.split()[0], threads=1, **METHODS[name])["w"]
    needs_base = name.split()[0] in ("task_arithmetic", "ties", "dare")
    assert merged.dtype == (torch.bfloat16 if needs_base else torch.float32)
    assert torch.equal(merged, torch.from_numpy(wide_N).to(merged.dtype))
