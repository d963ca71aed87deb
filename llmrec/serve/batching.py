"""Dynamic batching: combines questions of many clients into batches for one engine, with a bounded queue.

Requests with the same question are answered in one batch, since engines batch prompts. A full queue rejects questions
immediately, with the time until a retry.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from llmrec.answer.recommender import AnnotatedAnswer, Question
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError
from llmrec.serve.engine import EngineLost, Reply, stopping_error

_T = TypeVar("_T")

log = logging.getLogger(__name__)

# A call counts as hanging if it takes longer than this multiple of the request timeout.
_HANG_FACTOR = 5.0


class QueueFull(LlmrecError):
    """The queue is too long to answer in time; ``after`` is the number of seconds to wait before a retry."""

    after: float = 1.0

    @classmethod
    def for_now(cls, after: float) -> QueueFull:
        """Return the error with the number of seconds to wait before a retry."""
        error = cls(f"too many requests are queued; retry in {after:.0f} s", kind="busy")
        error.after = after
        return error


class AnswerTimeout(LlmrecError):
    """Raised if a question was not answered within its timeout."""


@dataclass(eq=False)
class _QueuedQuestion:
    request: RankRequest
    future: asyncio.Future[AnnotatedAnswer]
    ends: float


@dataclass
class QueueState:
    """The state of a queue, for metrics.

    Attributes:
        waiting: The number of questions in the queue.
        batches: The number of batches, by batch size.
        seconds: The total time of all batches.
        refused: The number of questions rejected by a full queue.
        late: The number of questions that timed out.
    """

    waiting: int = 0
    batches: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    refused: int = 0
    late: int = 0


class Batcher:
    """A queue that passes questions to an engine in batches.

    Args:
        engine: A function that answers a batch, called from a dedicated thread.
        window: Seconds that a question waits for others of its batch.
        most: The maximum batch size.
        room: The maximum length of the queue; further questions are rejected.
        patience: The timeout of a question in seconds, including the wait.
        hangs: Called from another thread if a call of the engine takes five times as long; it must end the call.
    """

    def __init__(
        self,
        engine: Callable[[Question, Sequence[RankRequest]], list[Reply]],
        *,
        window: float,
        most: int,
        room: int,
        patience: float,
        hangs: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._window, self._most, self._room, self._patience = engine, window, most, room, patience
        self._hangs = hangs
        self._queues: dict[Question, deque[_QueuedQuestion]] = {}
        # The questions in the current batch.
        self._batch: list[_QueuedQuestion] = []
        self._others = 0
        self._some, self._turn = asyncio.Event(), asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmrec-engine")
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        # Moving average of the engine's seconds per question.
        self._seconds_each = 0.25
        self.load = QueueState()

    def start(self) -> None:
        """Start processing; must be called in the event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Reject new questions, and return when the pending ones are answered or have timed out."""
        self._closed = True
        ends = time.monotonic() + self._patience
        while self._has_pending() and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        pending = self._batch
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for item in pending:
            _set_result(item.future, stopping_error())
        self._fail_queued(stopping_error())
        # the result of a running call is no longer needed
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def ask(self, question: Question, request: RankRequest) -> AnnotatedAnswer:
        """Answer a request; cancelling the caller removes it from the queue.

        Raises:
            QueueFull: If the queue is full, or too long to answer in time.
            AnswerTimeout: If it was not answered in time.
            EngineLost: If the engine ended, or the service is stopping.
            LlmrecError: If the question is invalid.
        """
        self.admit()
        waiting = _QueuedQuestion(
            request, asyncio.get_running_loop().create_future(), time.monotonic() + self._patience
        )
        self._queues.setdefault(question, deque()).append(waiting)
        self.load.waiting += 1
        self._some.set()
        try:
            return await asyncio.wait_for(waiting.future, self._patience)
        except TimeoutError:
            raise self.late() from None
        finally:
            self._remove_from_queue(question, waiting)

    async def between(self, call: Callable[[], _T]) -> _T:
        """Run an engine call between two batches; it is queued and rejected like a question.

        Raises:
            QueueFull: If the queue is full.
            AnswerTimeout: If it was not answered in time.
            EngineLost: If the engine ended, or the service is stopping.
        """
        self._check_queue_length(self._others)
        self._others += 1
        try:
            return await asyncio.wait_for(self._alone(call), self._patience)
        except TimeoutError:
            raise self.late() from None
        finally:
            self._others -= 1

    async def tell(self, call: Callable[[], _T]) -> _T:
        """Run an engine call between two batches, without queue limit or timeout.

        Raises:
            EngineLost: If the engine ended, or the service is stopping.
        """
        if self._closed:
            raise stopping_error()
        self._others += 1
        try:
            # Stored changes must reach the engine even if the caller is cancelled.
            return await asyncio.shield(self._alone(call))
        finally:
            self._others -= 1

    def admit(self) -> None:
        """Raise an error if the queue does not accept another question; see `ask`."""
        self._check_queue_length(self.load.waiting)

    def _check_queue_length(self, waiting: int) -> None:
        if self._closed:
            raise stopping_error()
        ahead = waiting * self._seconds_each
        if waiting >= self._room or ahead > self._patience:
            self.load.refused += 1
            raise QueueFull.for_now(max(1.0, min(ahead, self._patience)))

    def late(self) -> AnswerTimeout:
        """Count a question that timed out, and return the error to raise."""
        self.load.late += 1
        return AnswerTimeout(
            f"not answered within {self._patience:.0f} s; send fewer items, or raise --timeout", kind="exhausted"
        )

    def _has_pending(self) -> bool:
        return bool(self.load.waiting or self._others or any(not item.future.done() for item in self._batch))

    def _remove_from_queue(self, question: Question, waiting: _QueuedQuestion) -> None:
        queue = self._queues.get(question)
        if queue is not None and waiting in queue:
            queue.remove(waiting)
            self.load.waiting -= 1
            if not queue:
                del self._queues[question]

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            await asyncio.sleep(self._window)
            while self._queues:
                await self._next()
            self._some.clear()

    async def _next(self) -> None:
        """Answer a batch that includes the longest-waiting question."""
        async with self._turn:
            if not self._queues:
                return
            question = min(self._queues, key=lambda candidate: self._queues[candidate][0].ends)
            queue = self._queues[question]
            self._batch = [queue.popleft() for _ in range(min(self._most, len(queue)))]
            if not queue:
                del self._queues[question]
            self.load.waiting -= len(self._batch)
            try:
                await self._answer(question, self._batch)
            finally:
                self._batch = []

    async def _answer(self, question: Question, batch: Sequence[_QueuedQuestion]) -> None:
        begun = time.monotonic()
        requests = [waiting.request for waiting in batch]
        try:
            answers = await self._call_engine(lambda: self._engine(question, requests))
            for item, answer in zip(batch, answers, strict=True):
                _set_result(item.future, answer)
        except LlmrecError as error:
            for item in batch:
                _set_result(item.future, error)
            if isinstance(error, EngineLost):
                self._fail_queued(error)
            return
        except Exception:
            # An exception here would stop the queue for good.
            log.exception("unexpected error in a batch")
            for item in batch:
                _set_result(item.future, LlmrecError("internal error; see the log of the service", kind="defect"))
            return
        took = time.monotonic() - begun
        self._seconds_each = 0.8 * self._seconds_each + 0.2 * took / len(batch)
        self.load.seconds += took
        self.load.batches[len(batch)] = self.load.batches.get(len(batch), 0) + 1

    async def _alone(self, call: Callable[[], _T]) -> _T:
        async with self._turn:
            return await self._call_engine(call)

    async def _call_engine(self, call: Callable[[], _T]) -> _T:
        """Run a call in the thread of the engine, and report a call that hangs."""
        running = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            done, _ = await asyncio.wait({running}, timeout=_HANG_FACTOR * self._patience)
            if not done:
                log.error("the engine hangs: a call has taken %.0f s", _HANG_FACTOR * self._patience)
                await asyncio.to_thread(self._hangs)
            return await running
        finally:
            # A call that has not started when the caller is cancelled is dropped.
            running.cancel()

    def _fail_queued(self, error: EngineLost) -> None:
        """Fail all waiting questions, because the engine is not available."""
        for queue in self._queues.values():
            for waiting in queue:
                _set_result(waiting.future, error)
        self._queues.clear()
        self.load.waiting = 0


def _set_result(future: asyncio.Future[AnnotatedAnswer], reply: Reply) -> None:
    # the caller may have been cancelled in the meantime
    if future.done():
        return
    if isinstance(reply, LlmrecError):
        future.set_exception(reply)
    else:
        future.set_result(reply)
