"""Running jobs of several stages on a few threads.

A job is a generator: it yields a batch of tasks and is sent their results once all are done, then yields the next batch or
ends. Tasks of one batch run in parallel; a new job starts only where nothing else is ready, so few are open at a time and
memory stays small. Threads suffice because kernels, reading and writing release the GIL.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

Task = Callable[[], Any]
Job = Generator[Sequence[Task], list[Any], None]


def run_jobs(jobs: Iterable[Job], threads: int) -> None:
    """Run all jobs; the first exception stops the others and is raised, and so is KeyboardInterrupt."""
    _Scheduler(iter(jobs)).run(threads)


def run_at_once(job: Generator[Sequence[Task], list[Any], Any]) -> Any:
    """Run a job's tasks one after the other in this thread; what the job returns."""
    results: list[Any] | None = None
    while True:
        try:
            tasks = job.send(results)  # type: ignore[arg-type]
        except StopIteration as finished:
            return finished.value
        results = [task() for task in tasks]


class _Scheduler:
    def __init__(self, jobs: Iterator[Job]) -> None:
        self._jobs = jobs
        self._ready: deque[Task] = deque()
        self._open_jobs = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def run(self, threads: int) -> None:
        workers = [threading.Thread(target=self._work, daemon=True) for _ in range(max(1, threads))]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                while worker.is_alive():
                    worker.join(0.2)
        except KeyboardInterrupt as interrupt:
            self._fail(interrupt)
            for worker in workers:
                worker.join()
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (step := self._next()) is not None:
            try:
                step()
            except BaseException as error:
                self._fail(error)

    def _next(self) -> Task | None:
        with self._changed:
            while self._failure is None:
                if self._ready:
                    return self._ready.popleft()
                job = next(self._jobs, None)
                if job is not None:
                    self._open_jobs += 1
                    return partial(self._advance, job, None)
                if self._open_jobs == 0:
                    self._changed.notify_all()
                    return None
                self._changed.wait()
        return None

    def _advance(self, job: Job, results: list[Any] | None) -> None:
        tasks: Sequence[Task] = ()
        try:
            while not tasks:
                tasks = job.send(results)  # type: ignore[arg-type]
                results = []
        except StopIteration:
            with self._changed:
                self._open_jobs -= 1
                self._changed.notify_all()
            return
        batch = _Batch(job, tasks)
        with self._changed:
            self._ready.extend(partial(self._run_task, batch, index) for index in range(len(tasks)))
            self._changed.notify_all()

    def _run_task(self, batch: _Batch, index: int) -> None:
        result = batch.tasks[index]()
        with self._changed:
            batch.results[index] = result
            batch.remaining -= 1
            done = batch.remaining == 0
        if done:
            self._advance(batch.job, batch.results)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


class _Batch:
    def __init__(self, job: Job, tasks: Sequence[Task]) -> None:
        self.job, self.tasks = job, tasks
        self.results: list[Any] = [None] * len(tasks)
        self.remaining = len(tasks)
