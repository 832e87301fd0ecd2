"""Running many texts at once so that the result does not depend on how many.

Sums inside torch, BLAS and LAPACK are split over their threads, and so their last bits depend on the number of threads. Here
these libraries get one thread each, and the machine's cores work on different texts and layers instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from moerge.runtime.forced_routing import ForcedRoutingModel

Item = TypeVar("Item")
Result = TypeVar("Result")


class ModelReplicas:
    """A model and its replicas, one for each thread; on a GPU only the model. A context manager.

    Each thread holds a text's activations at a time, so memory grows with the threads, but not with the texts.
    """

    def __init__(self, model: ForcedRoutingModel, threads: int) -> None:
        self.model = model
        self._threads = threads if model.on_cpu else 1
        self._models = [model, *(model.replica() for _ in range(self._threads - 1))]
        self._pool = ThreadPoolExecutor(self._threads)
        self._begun = False

    def __enter__(self) -> ModelReplicas:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[ForcedRoutingModel, Item], Result], items: Sequence[Item]) -> Iterator[list[Result]]:
        """`work(model, item)` for all items in order, one at a time on each thread.

        The very first runs alone: libraries import what they need when it is needed, and not all of them in several threads.
        """
        start = 0
        while start < len(items):
            count = self._threads if self._begun else 1
            yield list(self._pool.map(work, self._models, items[start : start + count]))
            start, self._begun = start + count, True

    def map_layers(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`work(item)` for all items in order, without a model."""
        return list(self._pool.map(work, items))
