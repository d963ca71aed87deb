"""Runs requests to a server many at a time, and hands their answers out as they come.

An event loop lives in a thread of its own, so that connections outlast a call. What it finishes is handed over one by
one; the caller's thread stores each answer before it takes the next. Until then the answer keeps its place among those
under way, so that a slow disk cannot pile up answers that a kill would lose.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

T = TypeVar("T")

_END_SECONDS = 10.0


class Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmrec-server", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run one piece of work to its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def each(self, jobs: Sequence[Callable[[], Awaitable[T]]], together: int) -> Iterator[tuple[int, T]]:
        """Yield every job's place and result as they come, ``together`` at a time.

        A result counts as under way until the next one is taken. After a failure no further job begins. Those under
        way are finished and yielded, then the first failure is raised. Whoever stops taking results ends them all.
        """
        done: SimpleQueue[_Done[T] | None] = SimpleQueue()
        work = asyncio.run_coroutine_threadsafe(_all(jobs, together, done), self._loop)
        try:
            while (found := done.get()) is not None:
                yield found.place, found.result
                self._loop.call_soon_threadsafe(found.taken.set)
            if (failure := work.result()) is not None:
                raise failure
        finally:
            work.cancel()

    def close(self) -> None:
        """End the thread; calling it twice is harmless."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_END_SECONDS)
        if not self._loop.is_running() and not self._loop.is_closed():
            self._loop.close()


@dataclass(frozen=True)
class _Done(Generic[T]):
    """A result, and what says that it was taken."""

    place: int
    result: T
    taken: asyncio.Event


async def _all(
    jobs: Sequence[Callable[[], Awaitable[T]]], together: int, done: SimpleQueue[_Done[T] | None]
) -> Exception | None:
    waiting = iter(enumerate(jobs))
    failures: list[Exception] = []

    async def work() -> None:
        for place, job in waiting:
            try:
                found = _Done(place, await job(), asyncio.Event())
            except Exception as failure:
                failures.append(failure)
                return
            done.put(found)
            await found.taken.wait()
            if failures:
                return

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(together, len(jobs))):
                group.create_task(work())
    finally:
        done.put(None)
    return failures[0] if failures else None
