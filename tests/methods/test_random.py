from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moerge.tensors.random import drop, splitmix64, stream_key, uniform
from tests.helpers import reference

PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
"""SplitMix64 seeded with 1234567, as Rosetta Code lists it."""


def at(key: int, position: int) -> int:
    return int(splitmix64(np.uint64(key), np.uint64(position)))


def test_splitmix64_gives_the_published_outputs() -> None:
    assert reference.splitmix64(1234567, 5) == PUBLISHED
    assert [at(1234567, position) for position in range(5)] == PUBLISHED


@given(st.integers(0, 2**64 - 1), st.integers(1, 20))
def test_splitmix64_by_position_is_the_sequential_generator(key: int, count: int) -> None:
    assert [at(key, position) for position in range(count)] == reference.splitmix64(key, count)


@given(st.integers(0, 2**64 - 1), st.integers(1, 40), st.floats(0.01, 1))
def test_drop_keeps_the_entries_of_the_reference_mask(key: int, size: int, density: float) -> None:
    tau_EN = np.ones((1, size), np.float32)
    drop(tau_EN, np.array([key], np.uint64), 0, density, np.float32(3))
    np.testing.assert_array_equal(tau_EN[0], np.where(reference.dare_mask(key, size, density), np.float32(3), np.float32(0)))


@pytest.mark.parametrize("position", [0, 1])
def test_an_entry_is_kept_by_every_density_above_its_number(position: int) -> None:
    number = [PUBLISHED[0] & 0xFFFFFFFF, PUBLISHED[0] >> 32][position]
    kept = []
    for density in (number / 2**32, (number + 1) / 2**32):
        tau_EN = np.ones((1, 2), np.float32)
        drop(tau_EN, np.array([1234567], np.uint64), 0, density, np.float32(1))
        kept.append(bool(tau_EN[0, position]))
    assert kept == [False, True]


@given(st.integers(0, 2**64 - 1), st.integers(1, 60), st.data())
def test_drop_does_not_depend_on_how_a_tensor_is_cut(key: int, size: int, data: st.DataObject) -> None:
    keys_E = np.array([key, key ^ 1], np.uint64)
    whole_EN = np.ones((2, size), np.float32)
    drop(whole_EN, keys_E, 0, 0.5, np.float32(1))
    cut = 2 * data.draw(st.integers(0, size // 2))
    parts = [np.ones((2, cut), np.float32), np.ones((2, size - cut), np.float32)]
    drop(parts[0], keys_E, 0, 0.5, np.float32(1))
    drop(parts[1], keys_E, cut, 0.5, np.float32(1))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole_EN)


@given(st.integers(0, 2**64 - 1), st.integers(1, 60), st.data())
def test_uniform_does_not_depend_on_how_a_tensor_is_cut(key: int, size: int, data: st.DataObject) -> None:
    cut = 2 * data.draw(st.integers(0, size // 2))
    whole_N = uniform(np.uint64(key), 0, size)
    np.testing.assert_array_equal(
        np.concatenate([uniform(np.uint64(key), 0, cut), uniform(np.uint64(key), cut, size - cut)]), whole_N
    )


def test_uniform_is_uniform_in_its_interval() -> None:
    count = 100_000
    value_N = uniform(stream_key(0, "gate"), 0, count).astype(np.float64)
    assert value_N.min() >= -1
    assert value_N.max() < 1
    assert abs(value_N.mean()) < 5 / np.sqrt(3 * count)
    assert abs(value_N.var() - 1 / 3) < 5 * np.sqrt(4 / 45 / count)
    quarters = np.histogram(value_N, bins=4, range=(-1, 1))[0] / count
    np.testing.assert_allclose(quarters, 0.25, atol=5 * np.sqrt(0.25 * 0.75 / count))
    assert abs(np.corrcoef(value_N[:-1], value_N[1:])[0, 1]) < 5 / np.sqrt(count)


def test_stream_keys_differ_in_seed_and_in_every_name() -> None:
    keys = {
        int(stream_key(*parts)) for parts in [(0, "a", "b"), (1, "a", "b"), (0, "b", "a"), (0, "ab"), (0, "a"), (0, "a", "b", "")]
    }
    assert len(keys) == 6


def test_stream_keys_never_change_between_versions() -> None:
    assert stream_key(0, "math", "model.norm.weight") == np.uint64(17374400971627894359)


@pytest.mark.parametrize("start", [1, 32767])
def test_streams_start_at_even_positions_only(start: int) -> None:
    with pytest.raises(AssertionError):
        uniform(np.uint64(0), start, 2)
