"""Many jobs at a time: results as they come, failures that lose nothing, and an end when nobody takes any more."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest

from llmrec.backends.server.client import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()
    made.close()


class Work:
    """Jobs that note how many of them run at once, and which were cancelled."""

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


def test_results_come_as_they_are_ready_with_their_places(loop: Loop) -> None:
    work = Work()
    found = list(loop.each([work.job(n, 0.05 * (4 - n)) for n in range(5)], 5))
    assert found == [(4, 16), (3, 9), (2, 4), (1, 1), (0, 0)]
    assert list(loop.each([], 5)) == []


def test_no_more_run_together_than_asked(loop: Loop) -> None:
    work = Work()
    found = list(loop.each([work.job(n, 0.002) for n in range(50)], 7))
    assert work.most == 7
    assert sorted(found) == [(n, n * n) for n in range(50)]


def test_what_is_not_yet_taken_is_still_under_way(loop: Loop) -> None:
    work = Work()
    results = loop.each([work.job(n, 0.0) for n in range(20)], 4)
    for taken in range(1, 6):
        next(results)
        loop.run(asyncio.sleep(0.02))
        # The one in hand, and those that its four places hold.
        assert len(work.begun) == taken + 3
    results.close()  # type: ignore[attr-defined]


def test_after_a_failure_what_is_under_way_is_finished_and_nothing_begun(loop: Loop) -> None:
    work = Work()
    jobs = [
        work.job(0, 0.05),
        work.job(1, 0.01, ValueError("first")),
        work.job(2, 0.05),
        *[work.job(n, 0) for n in (3, 4)],
    ]
    found = []
    with pytest.raises(ValueError, match="first"):
        for place, _ in loop.each(jobs, 3):
            found.append(place)
    assert sorted(found) == [0, 2] and sorted(work.begun) == [0, 1, 2] and work.cancelled == []


def test_whoever_stops_taking_ends_them_all(loop: Loop) -> None:
    work = Work()
    results = loop.each([work.job(0, 0.0), work.job(1, 60.0), work.job(2, 60.0)], 3)
    assert next(results) == (0, 0)
    results.close()  # type: ignore[attr-defined]
    loop.run(asyncio.sleep(0.05))
    assert sorted(work.cancelled) == [1, 2] and work.now == 0


def test_the_thread_ends() -> None:
    made = Loop()
    assert made.run(asyncio.sleep(0, "done")) == "done"
    made.close()
    assert not made._thread.is_alive()
