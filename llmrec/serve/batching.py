"""Batches of the questions of many clients for one engine: a bounded queue with a short wait.

Requests with the same question are answered together, since an engine answers many prompts at once. A full queue
rejects at once and says when to ask again.
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

from llmrec.answer.recommender import Answered, Question
from llmrec.data.requests import RankRequest
from llmrec.errors import LlmrecError
from llmrec.serve.engine import EngineLost, Reply

_T = TypeVar("_T")

log = logging.getLogger(__name__)

# An engine hangs if it works on one call for this many times the patience of a request.
_HANGS = 5.0


class Full(LlmrecError):
    """More is asked than can be answered in time; ``after`` says in how many seconds to ask again."""

    after: float = 1.0

    @classmethod
    def for_now(cls, after: float) -> Full:
        """Return an error that says to ask again in some seconds."""
        made = cls(f"too many questions are waiting; ask again in {after:.0f} s", kind="busy")
        made.after = after
        return made


class TooLate(LlmrecError):
    """A question was not answered in the time that it may take."""


@dataclass(eq=False)
class _Waiting:
    request: RankRequest
    future: asyncio.Future[Answered]
    ends: float


@dataclass
class Load:
    """The state of a queue, for metrics.

    Attributes:
        waiting: Questions in the queue.
        batches: How many were asked, by the number of their questions.
        seconds: Of all batches together.
        refused: Questions that found the queue full.
        late: Questions that were given up.
    """

    waiting: int = 0
    batches: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    refused: int = 0
    late: int = 0


class Batcher:
    """Hands questions to an engine, a batch at a time.

    Args:
        engine: Answers a batch; it is called from one thread of its own.
        window: Seconds that a question waits for others to go with it.
        most: Questions of one batch.
        room: Questions that may wait; more are refused.
        patience: Seconds that a question may take, waiting included.
        hangs: Called from another thread when the engine has worked on one thing for five times as long; it is to end
            the call.
    """

    def __init__(
        self,
        engine: Callable[[Question, Sequence[RankRequest]], list[Reply]],
        *,
        window: float = 0.005,
        most: int = 32,
        room: int = 256,
        patience: float = 60.0,
        hangs: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine, self._window, self._most, self._room, self._patience = engine, window, most, room, patience
        self._hangs = hangs
        self._queues: dict[Question, deque[_Waiting]] = {}
        # Those that the engine is answering now.
        self._asked: list[_Waiting] = []
        self._others = 0
        self._some, self._turn = asyncio.Event(), asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llmrec-engine")
        self._task: asyncio.Task[None] | None = None
        self._closed = False
        # Seconds that one question takes of the engine, as it was lately.
        self._each = 0.25
        self.load = Load()

    def start(self) -> None:
        """Begin to hand out; call it inside the event loop."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Take no more questions, and end once those that were asked are answered or given up."""
        self._closed = True
        ends = time.monotonic() + self._patience
        while self._busy() and time.monotonic() < ends:
            await asyncio.sleep(0.01)
        asked = self._asked
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for item in asked:
            _settle(item.future, _stopping())
        self._fail(_stopping())
        # Nobody waits for what it may still be doing.
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def ask(self, question: Question, request: RankRequest) -> Answered:
        """Wait for the answer to a request; a caller that is cancelled takes it out of the queue.

        Raises:
            Full: If the queue is full, or so long that the answer would come too late.
            TooLate: If it was not answered in time.
            EngineLost: If the engine ended, or the service does.
            LlmrecError: If the question cannot be put.
        """
        self._admit(self.load.waiting)
        waiting = _Waiting(request, asyncio.get_running_loop().create_future(), time.monotonic() + self._patience)
        self._queues.setdefault(question, deque()).append(waiting)
        self.load.waiting += 1
        self._some.set()
        try:
            return await asyncio.wait_for(waiting.future, self._patience)
        except TimeoutError:
            raise self.late() from None
        finally:
            self._drop(question, waiting)

    async def between(self, call: Callable[[], _T]) -> _T:
        """Ask the engine something else between batches; it waits, and is refused, as a question is.

        Raises:
            Full: If as many wait as may.
            TooLate: If it was not answered in time.
            EngineLost: If the engine ended, or the service does.
        """
        self._admit(self._others)
        self._others += 1
        try:
            return await asyncio.wait_for(self._alone(call), self._patience)
        except TimeoutError:
            raise self.late() from None
        finally:
            self._others -= 1

    async def tell(self, call: Callable[[], _T]) -> _T:
        """Tell the engine something between batches, however many wait and however long it takes.

        Raises:
            EngineLost: If the engine ended, or the service does.
        """
        if self._closed:
            raise _stopping()
        self._others += 1
        try:
            # What is stored already has to reach the engine, whoever waits for that.
            return await asyncio.shield(self._alone(call))
        finally:
            self._others -= 1

    def _admit(self, waiting: int) -> None:
        """Let a question in."""
        if self._closed:
            raise _stopping()
        ahead = waiting * self._each
        if waiting >= self._room or ahead > self._patience:
            self.load.refused += 1
            raise Full.for_now(max(1.0, min(ahead, self._patience)))

    def late(self) -> TooLate:
        """Count a question that is given up, and return its error."""
        self.load.late += 1
        return TooLate(
            f"not answered within {self._patience:.0f} s; ask for less, or raise --timeout", kind="exhausted"
        )

    def _busy(self) -> bool:
        return bool(self.load.waiting or self._others or any(not item.future.done() for item in self._asked))

    def _drop(self, question: Question, waiting: _Waiting) -> None:
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
        """Ask the engine the kind of question that has waited longest."""
        async with self._turn:
            if not self._queues:
                return
            question = min(self._queues, key=lambda each: self._queues[each][0].ends)
            queue = self._queues[question]
            self._asked = [queue.popleft() for _ in range(min(self._most, len(queue)))]
            if not queue:
                del self._queues[question]
            self.load.waiting -= len(self._asked)
            try:
                await self._answer(question, self._asked)
            finally:
                self._asked = []

    async def _answer(self, question: Question, batch: Sequence[_Waiting]) -> None:
        begun = time.monotonic()
        requests = [waiting.request for waiting in batch]
        try:
            answers = await self._called(lambda: self._engine(question, requests))
            for item, answer in zip(batch, answers, strict=True):
                _settle(item.future, answer)
        except LlmrecError as error:
            for item in batch:
                _settle(item.future, error)
            if isinstance(error, EngineLost):
                self._fail(error)
            return
        except Exception:
            # Nothing would be answered any more if this went further.
            log.exception("a batch failed that should not have")
            for item in batch:
                _settle(item.future, LlmrecError("this question failed; the log says where", kind="defect"))
            return
        took = time.monotonic() - begun
        self._each = 0.8 * self._each + 0.2 * took / len(batch)
        self.load.seconds += took
        self.load.batches[len(batch)] = self.load.batches.get(len(batch), 0) + 1

    async def _alone(self, call: Callable[[], _T]) -> _T:
        async with self._turn:
            return await self._called(call)

    async def _called(self, call: Callable[[], _T]) -> _T:
        """Call something in the engine's thread, and notice where it never ends."""
        running = asyncio.get_running_loop().run_in_executor(self._thread, call)
        try:
            done, _ = await asyncio.wait({running}, timeout=_HANGS * self._patience)
            if not done:
                log.error("the engine hangs: it has worked on one thing for %.0f s", _HANGS * self._patience)
                await asyncio.to_thread(self._hangs)
            return await running
        finally:
            # What has not begun when the caller goes is not begun.
            running.cancel()

    def _fail(self, error: EngineLost) -> None:
        """Give up all waiting questions: there is no engine to answer them."""
        for queue in self._queues.values():
            for waiting in queue:
                _settle(waiting.future, error)
        self._queues.clear()
        self.load.waiting = 0


def _stopping() -> EngineLost:
    return EngineLost("the service is stopping; ask again in a moment", kind="failed")


def _settle(future: asyncio.Future[Answered], found: Reply) -> None:
    # Whoever asked may have gone meanwhile.
    if future.done():
        return
    if isinstance(found, LlmrecError):
        future.set_exception(found)
    else:
        future.set_result(found)
