"""A few threads for grading that takes long, code that runs above all, while the engine goes on answering."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Any

MOST_THREADS = 8


def thread_count() -> int:
    """Half of the cores that this process may use, so that time limits of what runs hold beside an engine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // 2))


class Threads:
    """Jobs by number. Left by an exception, those that have not begun never do, and nobody waits for the others."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: dict[int, Future[Any]] = {}
        self._errors: list[BaseException] = []

    def start(self, number: int, job: Callable[[], Any]) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(thread_count(), thread_name_prefix="mergemix-grading")
        self._jobs[number] = self._pool.submit(job)
        self._jobs[number].add_done_callback(self._note)

    def check(self) -> None:
        """Raise what a job raised, the first of them."""
        if self._errors:
            raise self._errors[0]

    def results(self) -> Iterator[tuple[int, Any]]:
        """(number, result) of all jobs, when they are done; raises as `check`, as soon as there is an error."""
        wait(self._jobs.values(), return_when=FIRST_EXCEPTION)
        self.check()
        for number, job in self._jobs.items():
            yield number, job.result()

    def _note(self, job: Future[Any]) -> None:
        if not job.cancelled() and (error := job.exception()) is not None:
            self._errors.append(error)

    def __enter__(self) -> Threads:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
