"""Concurrent jobs: results in order of completion, failures without loss, and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from llmrec.backends.server.client import EventLoopThread


@pytest.fixture
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread()
    yield loop
    loop.close()
    loop.close()
    assert not loop._thread.is_alive()


class Work:
    """Jobs that record how many run at once and which were cancelled."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.begun: list[int] = []
        self.cancelled: list[int] = []

    def job(self, n: int, seconds: float, failure: Exception | None = None) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            self.begun.append(n)
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                self.cancelled.append(n)
                raise
            finally:
                self.now -= 1
            if failure is not None:
                raise failure
            return n * n

        return run


def test_results_in_order_of_completion(loop: EventLoopThread) -> None:
    work = Work()
    results = list(loop.each([work.job(n, 0.05 * (4 - n)) for n in range(5)], 5))
    assert results == [(4, 16), (3, 9), (2, 4), (1, 1), (0, 0)]
    assert list(loop.each([], 5)) == []


def test_concurrency_limit(loop: EventLoopThread) -> None:
    work = Work()
    results = list(loop.each([work.job(n, 0.002) for n in range(50)], 7))
    assert work.most == 7
    assert sorted(results) == [(n, n * n) for n in range(50)]


def test_new_jobs_start_when_results_are_taken(loop: EventLoopThread) -> None:
    work = Work()
    results = loop.each([work.job(n, 0.0) for n in range(20)], 4)
    for taken in range(1, 6):
        next(results)
        loop.run(asyncio.sleep(0.02))
        # The jobs of the results taken, and the concurrent ones.
        assert len(work.begun) == taken + 3
    results.close()  # type: ignore[attr-defined]


def test_failure_finishes_running_jobs_and_starts_none(loop: EventLoopThread) -> None:
    work = Work()
    jobs = [
        work.job(0, 0.05),
        work.job(1, 0.01, ValueError("first")),
        work.job(2, 0.05),
        *[work.job(n, 0) for n in (3, 4)],
    ]
    results = []
    with pytest.raises(ValueError, match="first"):
        for index, _ in loop.each(jobs, 3):
            results.append(index)
    assert sorted(results) == [0, 2] and sorted(work.begun) == [0, 1, 2] and work.cancelled == []


def test_closing_cancels_running_jobs(loop: EventLoopThread) -> None:
    work = Work()
    results = loop.each([work.job(0, 0.0), work.job(1, 60.0), work.job(2, 60.0)], 3)
    assert next(results) == (0, 0)
    results.close()  # type: ignore[attr-defined]
    loop.run(asyncio.sleep(0.05))
    assert sorted(work.cancelled) == [1, 2] and work.now == 0
