"""Tensors that are merged row by row or whole: the same digests, progress and order as block by block; bounded memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moerge
from moerge import InputError
from moerge.execution import regions
from moerge.execution.executor import Executor
from moerge.execution.regions import MemoryBudget
from moerge.methods import Block, MergeMethod, TaskVectorMethod, merge_method
from moerge.methods.method import Unit
from moerge.operations.estimate import region_bytes
from moerge.operations.operations import Merge, Output
from moerge.tensors.digest import CHUNK, TensorDigest, chunk_digest, tensor_digest
from moerge.tensors.dtypes import F32
from moerge.tensors.source import Source
from moerge.tensors.streams import BLOCK, WINDOW
from moerge.tensors.tensor import ArrayTensor
from tests.helpers import tiny

LOG: list[tuple[int, tuple[int, ...]]] = []


class Logged(MergeMethod):
    """The sum of experts and of their statistics; notes what it is given."""

    name: ClassVar[str] = "logged"
    at_a_time: Unit = "rows"

    @property
    def unit(self) -> Unit:
        return self.at_a_time

    def merge(self, block: Block) -> None:
        LOG.append((block.start, block.shape))
        assert block.theta_EN.flags.c_contiguous
        added: Any = 0
        if block.extras is not None and self.unit == "tensor":
            added = sum(extra.sum() for extra in block.extras if extra is not None)
        elif block.extras is not None:
            added = block.extras.sum(axis=0)
        block.out_N[:] = block.theta_EN.sum(axis=0) + added


class Store:
    """Arrays and digests."""

    def __init__(self, outputs: tuple[Output, ...]) -> None:
        self.arrays = {made.name: np.empty(made.size, made.dtype.storage) for made in outputs}
        self.digests: dict[str, tuple[str, dict[str, str]]] = {}

    def write(self, output: Output, start: int, data: np.ndarray) -> None:
        self.arrays[output.name][start : start + data.size] = data

    def done(self, output: Output, digest: str, inputs: dict[str, str], nonfinite: list[str]) -> None:
        self.digests[output.name] = digest, inputs

    def finished(self, output: Output) -> bool:
        return False


def source(model: str, array: np.ndarray, name: str = "w") -> Source:
    return Source(model, ArrayTensor(name, F32, array.shape, array.reshape(-1)))


def output(method: MergeMethod, theta: np.ndarray, *extras: np.ndarray | None, name: str = "w") -> Output:
    experts = tuple(source(f"e{k}", array, name) for k, array in enumerate(theta))
    given = tuple(None if extra is None else source(f"s{k}", extra, name) for k, extra in enumerate(extras))
    return Output(name, "", F32, theta.shape[1:], Merge(method, experts, (1.0,) * len(experts), extras=given))


def run(*outputs: Output, threads: int = 1) -> tuple[Store, int]:
    LOG.clear()
    store, advanced = Store(outputs), [0]
    lock = threading.Lock()

    def advance(nbytes: int) -> None:
        with lock:
            advanced[0] += nbytes

    Executor(store, advance=advance).run(outputs, threads)
    return store, advanced[0]


def numbers(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) % 1000


@given(st.lists(st.integers(1, 40), max_size=12))
def test_the_digest_of_a_stream_does_not_depend_on_its_pieces(lengths: list[int]) -> None:
    data_N = np.arange(sum(lengths), dtype=np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moerge.tensors.digest.CHUNK", 16)
        stream, start = TensorDigest(), 0
        for length in lengths:
            stream.update(data_N[start : start + length])
            start += length
        assert stream.digest() == tensor_digest(chunk_digest(data_N[i : i + 16]) for i in range(0, data_N.size, 16))


@pytest.mark.parametrize(
    "shape", [(7,), (3, 4), (2, 3, 4), (5, BLOCK // 4 + 1), (2, WINDOW + 3), (2 * CHUNK + 5,), (3, CHUNK - 1)], ids=str
)
@pytest.mark.parametrize("unit", ["rows", "tensor"])
def test_results_digests_and_progress_are_those_of_blocks(unit: Unit, shape: tuple[int, ...]) -> None:
    theta = np.stack([numbers(*shape), numbers(*shape) + 1])
    by_block, _ = run(output(Logged(at_a_time="block"), theta))
    made = output(Logged(at_a_time=unit), theta)
    store, advanced = run(made)
    np.testing.assert_array_equal(store.arrays["w"], theta.sum(axis=0).reshape(-1))
    assert store.digests == by_block.digests
    assert list(store.digests["w"][1]) == ["e0:w", "e1:w"]
    assert advanced == made.work_bytes
    if unit == "tensor":
        assert LOG[0] == (0, shape) and len(LOG) == 1
    columns = shape[-1] if len(shape) > 1 else theta[0].size
    assert [given[-1] for _, given in LOG] == [columns] * len(LOG) or unit == "tensor"
    assert sum(np.prod(given) for _, given in LOG) == theta[0].size
    assert unit == "tensor" or all(np.prod(given) <= max(BLOCK, columns) for _, given in LOG)


@pytest.mark.parametrize("unit", ["block", "rows"])
def test_statistics_come_with_the_same_elements_and_zeros_where_there_are_none(unit: Unit) -> None:
    theta, extra = numbers(3, 40, BLOCK // 16), numbers(40, BLOCK // 16) / 4
    made = output(Logged(at_a_time=unit), theta, extra, None, extra + 1)
    store, advanced = run(made)
    np.testing.assert_array_equal(store.arrays["w"], (theta.sum(axis=0) + extra + (extra + 1)).reshape(-1))
    assert list(store.digests["w"][1]) == ["e0:w", "e1:w", "e2:w", "s0:w", "s2:w"]
    assert advanced == made.work_bytes == (3 + 2 + 1) * extra.nbytes


def test_statistics_of_whole_tensors_have_their_own_shapes() -> None:
    theta = numbers(2, 6, 5)
    store, _ = run(output(Logged(at_a_time="tensor"), theta, numbers(5, 5), None))
    np.testing.assert_array_equal(store.arrays["w"], theta.sum(axis=0).reshape(-1) + numbers(5, 5).sum())


def test_a_source_may_be_read_for_two_experts() -> None:
    one = source("e", numbers(4, 5))
    made = Output("w", "", F32, (4, 5), Merge(Logged(), (one, one), (1.0, 1.0)))
    np.testing.assert_array_equal(run(made)[0].arrays["w"], 2 * numbers(4, 5).reshape(-1))


def test_nonfinite_statistics_are_named() -> None:
    extra = numbers(2, 3)
    extra[1, 1] = np.nan
    for unit in ("block", "rows", "tensor"):
        with pytest.raises(InputError, match=r"^s0: tensor 'w' holds NaN or infinity"):
            run(output(Logged(at_a_time=unit), numbers(1, 2, 3), extra))


def test_whole_tensors_wait_for_memory_and_none_is_overtaken() -> None:
    budget, order = MemoryBudget(10), []
    held, done = threading.Event(), threading.Event()

    def hold(nbytes: int, wait: threading.Event | None = None) -> None:
        with budget.hold(nbytes):
            order.append(nbytes)
            held.set()
            if wait is not None:
                wait.wait()

    first = threading.Thread(target=hold, args=(6, done))
    first.start()
    held.wait()
    large, small = threading.Thread(target=hold, args=(10,)), threading.Thread(target=hold, args=(3,))
    large.start()
    until = time.monotonic() + 5
    while not budget._turn.locked() and time.monotonic() < until:
        time.sleep(0.001)
    small.start()
    done.set()
    for thread in (first, large, small):
        thread.join()
    assert order == [6, 10, 3]


def test_together_tensors_at_work_need_no_more_than_the_largest_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    held, most, lock = [0], [0], threading.Lock()
    original: Callable[..., None] = regions.RegionMerge.run

    def watched(self: Any) -> None:
        with lock:
            held[0] += region_bytes(self.output)
            most[0] = max(most[0], held[0])
        time.sleep(0.005)
        original(self)
        with lock:
            held[0] -= region_bytes(self.output)

    monkeypatch.setattr(regions.RegionMerge, "run", watched)
    outputs = [
        output(Logged(at_a_time="tensor"), numbers(2, rows, 8), name=f"t{rows}") for rows in (1, 2, 3, 4, 9, 4, 3, 10, 5)[:8]
    ]
    run(*outputs[:5], *outputs[7:], threads=4)
    assert region_bytes(outputs[2]) < most[0] <= region_bytes(outputs[7])


UNITS = ["della", "tsv_m", "iso_c", "model_stock"]


@pytest.mark.parametrize("method", UNITS)
def test_threads_change_no_bit(method: str) -> None:
    random = np.random.default_rng(0)
    shapes = [(60, 50), (50,), (33, 70), (5, CHUNK // 4 + 3), (60, 50), (64, 64)]
    base = {f"t{i}": random.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}
    experts = [{n: a + random.standard_normal(a.shape).astype(np.float32) for n, a in base.items()} for _ in range(3)]
    settings = {"filter_wise": True} if method == "model_stock" else {}
    one = moerge.merge_state_dicts(base, experts, method=method, threads=1, **settings)
    for threads in (2, 5):
        many = moerge.merge_state_dicts(base, experts, method=method, threads=threads, **settings)
        assert all(many[name].tobytes() == one[name].tobytes() for name in one)


@pytest.mark.parametrize("method", UNITS)
def test_checkpoints_are_merged_and_verified(method: str, tmp_path: Path) -> None:
    models = tiny.make_models(tmp_path)
    recipe = tiny.write_recipe(tmp_path, merge={"method": method})
    results = [moerge.merge(recipe, tmp_path / f"out{threads}", threads=threads) for threads in (1, 2)]
    for result in results:
        moerge.verify(result.folder)
    values = [tiny.read_values(result.folder) for result in results]
    in_memory = moerge.merge_state_dicts(
        tiny.read_values(models["base"]), {name: tiny.read_values(models[name]) for name in tiny.EXPERTS}, method=method
    )
    for name, expected in in_memory.items():
        np.testing.assert_array_equal(values[0][name], values[1][name])
        np.testing.assert_allclose(values[0][name], expected, rtol=2**-8, atol=1e-6)


def test_the_plan_counts_the_memory_of_the_largest_tensor(tmp_path: Path) -> None:
    tiny.make_models(tmp_path)
    plain, whole_tensors = (moerge.plan(tiny.write_recipe(tmp_path, merge={"method": m})) for m in ("task_arithmetic", "tsv_m"))
    largest = max(region_bytes(made) for made in whole_tensors.outputs)
    assert largest > 4 * (len(tiny.EXPERTS) + 2) * max(made.size for made in whole_tensors.outputs)
    assert [plan.memory_bytes(1) for plan in (plain, whole_tensors)] == [plain.memory_bytes(1), plain.memory_bytes(1) + largest]
    assert whole_tensors.memory_bytes(8) - whole_tensors.memory_bytes(1) == plain.memory_bytes(8) - plain.memory_bytes(1)


@pytest.mark.parametrize("method", ["ties", "magnitude_pruning", "breadcrumbs", "sce", "slerp", "model_stock"])
@pytest.mark.parametrize("size", [100, CHUNK + 3])
def test_progress_adds_up_to_what_was_announced(method: str, size: int) -> None:
    settings = {"select_topk": 0.5} if method == "sce" else {}
    chosen = merge_method(method)(**settings)
    theta = np.random.default_rng(0).standard_normal((2, size)).astype(np.float32)
    base = source("base", np.zeros(size, np.float32)) if chosen.uses_task_vectors else None
    operation = Merge(chosen, (source("e0", theta[0]), source("e1", theta[1])), (1.0, 1.0), base)
    made = Output("w", "", F32, (size,), operation)
    assert run(made)[1] == made.work_bytes


def test_nothing_is_measured_where_nothing_is_trimmed() -> None:
    for method in ("ties", "magnitude_pruning"):
        kind = merge_method(method)
        assert issubclass(kind, TaskVectorMethod)
        assert (kind(density=1).measures, kind(density=0.5).measures, kind(density=[1, 0.5]).measures) == (0, 2, 2)
        assert not kind(density=1, scope="model").spans_model
