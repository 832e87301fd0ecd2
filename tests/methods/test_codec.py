from __future__ import annotations

import numpy as np
import pytest
import torch

from moerge.tensors.codec import all_finite, decode, encode
from moerge.tensors.dtypes import BF16, DTYPES, F16, F32, DType

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
TORCH_TYPES = {BF16.name: torch.bfloat16, F16.name: torch.float16}
SPECIAL = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x00000001, 0x007FFFFF]
SPECIAL += [0x7F7FFFFF, 0x7F7F7FFF, 0x7F7F8000, 0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x00008000, 0x00018000]
SPECIAL += np.float32([65504, 65519.996, 65520, -65520, 1e-8, 2**-25, 2**-24, 6e-8, 1.0009765625]).view(np.uint32).tolist()
FLOATS = [BF16, F16]


def float32_patterns() -> np.ndarray:
    """Random bits, special values, and every boundary between neighbouring 16-bit values with its neighbours."""
    random_N = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    bf16_ties_N = (ALL_16.astype(np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    ties_N = np.concatenate([bf16_ties_N, half_ties()])
    return np.concatenate([random_N, np.array(SPECIAL, np.uint32), ties_N - np.uint32(1), ties_N, ties_N + np.uint32(1)])


def half_ties() -> np.ndarray:
    values_N = np.sort(ALL_16.view(np.float16)[np.isfinite(ALL_16.view(np.float16))].astype(np.float64))
    return ((values_N[1:] + values_N[:-1]) / 2).astype(np.float32).view(np.uint32)


def decoded(stored_N: np.ndarray, dtype: DType) -> tuple[np.ndarray, bool]:
    out_N = np.empty(stored_N.size, np.float32)
    return out_N, decode(stored_N, dtype, out_N)


def encoded(value_N: np.ndarray, dtype: DType) -> np.ndarray:
    out_N = np.empty(value_N.size, dtype.storage)
    encode(value_N, dtype, out_N)
    return out_N.view(np.uint16)


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_decoding_every_pattern_equals_torch(dtype: DType) -> None:
    value_N, finite = decoded(ALL_16.view(dtype.storage), dtype)
    expected_N = torch.from_numpy(ALL_16.copy()).view(TORCH_TYPES[dtype.name]).float().numpy()
    np.testing.assert_array_equal(np.isnan(value_N), np.isnan(expected_N))
    numbers = ~np.isnan(expected_N)
    np.testing.assert_array_equal(value_N[numbers].view(np.uint32), expected_N[numbers].view(np.uint32))
    assert not finite


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_every_pattern_survives_decoding_and_encoding(dtype: DType) -> None:
    value_N, _ = decoded(ALL_16.view(dtype.storage), dtype)
    back_N = encoded(value_N, dtype)
    numbers = ~np.isnan(value_N)
    np.testing.assert_array_equal(back_N[numbers], ALL_16[numbers])
    assert np.isnan(decoded(back_N[~numbers].view(dtype.storage), dtype)[0]).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: dtype.name)
def test_rounding_equals_torch_on_any_bits(dtype: DType) -> None:
    value_N = float32_patterns().view(np.float32)
    expected_N = torch.from_numpy(value_N.copy()).to(TORCH_TYPES[dtype.name]).view(torch.uint16).numpy()
    actual_N = encoded(value_N, dtype)
    nan = np.isnan(value_N)
    np.testing.assert_array_equal(actual_N[~nan], expected_N[~nan])
    assert np.isnan(decoded(actual_N[nan].view(dtype.storage), dtype)[0]).all()


@pytest.mark.parametrize(
    ("value", "bits"),
    [
        (1.0, 0x3F80),
        (1 + 2**-8, 0x3F80),
        (1 + 3 * 2**-8, 0x3F82),
        (1 + 2**-8 + 2**-20, 0x3F81),
        (-0.0, 0x8000),
        (3.4028235e38, 0x7F80),
        (float("-inf"), 0xFF80),
        (2**-133, 0x0001),
        (2**-134, 0x0000),
    ],
)
def test_bfloat16_rounds_to_nearest_even(value: float, bits: int) -> None:
    assert encoded(np.array([value], np.float32), BF16).tolist() == [bits]


def test_float32_passes_through() -> None:
    bits_N = np.array(SPECIAL, np.uint32)
    value_N, finite = decoded(bits_N.view(np.float32), F32)
    np.testing.assert_array_equal(value_N.view(np.uint32), bits_N)
    assert not finite
    out_N = np.empty(bits_N.size, np.float32)
    encode(value_N, F32, out_N)
    np.testing.assert_array_equal(out_N.view(np.uint32), bits_N)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("culprit", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 7, 64, 1001])
def test_one_nonfinite_value_anywhere_is_found(dtype: DType, culprit: float, size: int) -> None:
    for index in (None, 0, size // 2, size - 1):
        value_N = np.linspace(-60000, 60000, size).astype(np.float32)
        if index is not None:
            value_N[index] = culprit
        stored_N = np.empty(size, dtype.storage)
        encode(value_N, dtype, stored_N)
        assert all_finite(stored_N, dtype) is (index is None)
        assert decoded(stored_N, dtype)[1] is (index is None)


def test_types_without_nan_are_finite() -> None:
    assert all_finite(np.array([-1, 2**31 - 1], np.int32), DTYPES["I32"])
    with pytest.raises(AssertionError, match="I32 is not a float type"):
        decode(np.zeros(1, np.int32), DTYPES["I32"], np.zeros(1, np.float32))
