"""The queue before an engine, which is a function here: batches, rejections and timeouts."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from llmrec.answer.recommender import AnnotatedAnswer, Question
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError, LlmrecError
from llmrec.serve.batching import AnswerTimeout, Batcher, QueueFull
from llmrec.serve.engine import EngineLost, Reply
from llmrec.types import Unparsed

RANK = Question(model=None, verb="rank")
RATE = Question(model=None, verb="rating")


def request(name: object) -> RankRequest:
    return RankRequest(id=str(name), candidates=())


def reply(name: str) -> AnnotatedAnswer:
    return AnnotatedAnswer(answer=Unparsed(request_id=name, reason="invalid"))


def named(answer: Reply) -> str:
    assert isinstance(answer, AnnotatedAnswer)
    return answer.answer.request_id


@dataclass
class FakeEngine:
    """Answers with the ids of the requests after some seconds."""

    seconds: float = 0.0
    fault: BaseException | None = None
    batches: list[tuple[Question, list[str]]] = field(default_factory=list)
    free: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.free.set()

    def ask(self, question: Question, requests: Sequence[RankRequest]) -> list[Reply]:
        self.batches.append((question, [each.id for each in requests]))
        assert self.free.wait(60)
        time.sleep(self.seconds)
        if self.fault is not None:
            raise self.fault
        return [reply(each.id) for each in requests]


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine()
    yield engine
    engine.free.set()


def batcher_for(ask: Any, **settings: Any) -> Batcher:
    return Batcher(ask, **{"window": 0.02, "most": 32, "room": 256, "patience": _LONG, **settings})


@asynccontextmanager
async def running(engine: FakeEngine, **settings: Any) -> Any:
    batcher = batcher_for(engine.ask, **settings)
    batcher.start()
    try:
        yield batcher
    finally:
        engine.free.set()
        await batcher.close()


_LONG = 600.0
"""Timeout of a test in seconds; no result depends on it."""


def within(seconds: float, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a coroutine with a timeout."""

    async def limited() -> Any:
        return await asyncio.wait_for(work(), seconds)

    return asyncio.run(limited())


def outcomes(results: Sequence[Any]) -> list[str]:
    return [named(each) if isinstance(each, AnnotatedAnswer) else type(each).__name__ for each in results]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_questions_are_batched_in_order(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.1, most=8) as batcher:
            results = await asyncio.gather(*(batcher.ask(RANK, request(n)) for n in range(20)))
            assert [named(each) for each in results] == [str(n) for n in range(20)]
            assert batcher.load.batches == {8: 2, 4: 1}

    within(_LONG, work)
    assert [len(ids) for _, ids in engine.batches] == [8, 8, 4]
    assert [name for _, ids in engine.batches for name in ids] == [str(n) for n in range(20)]


def test_different_questions_are_not_batched(engine: FakeEngine) -> None:
    kinds = [RANK, RATE, Question(model="other", verb="rank"), Question(model=None, verb="rank", depth=3)]

    async def work() -> list[AnnotatedAnswer]:
        async with running(engine, window=0.1) as batcher:
            # Equal questions are one kind, also if they are other objects.
            pending = [(replace(kinds[n % 4]), request(n)) for n in range(12)]
            return list(await asyncio.gather(*(batcher.ask(*each) for each in pending)))

    assert [named(each) for each in within(_LONG, work)] == [str(n) for n in range(12)]
    # The question that has waited longest goes first.
    assert engine.batches == [(kind, [str(n) for n in range(12) if n % 4 == k]) for k, kind in enumerate(kinds)]


def test_waiting_questions_form_the_next_batch(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0) as batcher:
            engine.free.clear()
            first = asyncio.ensure_future(batcher.ask(RANK, request("first")))
            await until(lambda: bool(engine.batches))
            rest = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(5)]
            await until(lambda: batcher.load.waiting == 5)
            engine.free.set()
            await asyncio.gather(first, *rest)

    within(_LONG, work)
    assert [ids for _, ids in engine.batches] == [["first"], ["0", "1", "2", "3", "4"]]


def test_full_queue_rejects_at_once(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=4, room=8) as batcher:
            engine.free.clear()
            pending = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(4)]
            await until(lambda: bool(engine.batches))
            pending += [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(4, 12)]
            await until(lambda: batcher.load.waiting == 8)
            with pytest.raises(QueueFull) as caught:
                # The first step raises, without waiting.
                batcher.ask(RATE, request("one too many")).send(None)
            assert caught.value.kind == "busy" and 1.0 <= caught.value.after <= 30.0
            engine.free.set()
            assert outcomes(await asyncio.gather(*pending)) == [str(n) for n in range(12)]
            assert batcher.load.refused == 1 and batcher.load.waiting == 0

    within(_LONG, work)


def test_overload_does_not_affect_accepted_questions(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=4, room=16) as batcher:
            results: list[str] = []
            for part in range(2):
                # A hundred questions arrive while the engine is busy, five times as many as fit.
                engine.free.clear()
                pending = [asyncio.ensure_future(batcher.ask(RANK, request(100 * part + n))) for n in range(100)]
                await until(lambda pending=pending: sum(each.done() for each in pending) >= 80)
                engine.free.set()
                results += outcomes(await asyncio.gather(*pending, return_exceptions=True))
            answered = [n for n, name in enumerate(results) if name == str(n)]
            assert set(results) - {"QueueFull"} == {str(n) for n in answered}
            assert 2 * 16 <= len(answered) <= 2 * 20 and results.count("QueueFull") == batcher.load.refused >= 160
            # Each accepted question reached the engine once, in order.
            assert [name for _, ids in engine.batches for name in ids] == [str(n) for n in answered]

    within(_LONG, work)


def test_slow_queue_rejects_before_it_is_full(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=1, room=10_000, patience=600.0) as batcher:
            # As if measured recently: six questions can be answered in time.
            batcher._seconds_each = 100.0
            engine.free.clear()
            pending = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(100)]
            await until(lambda: batcher.load.refused >= 90)
            engine.free.set()
            results = outcomes(await asyncio.gather(*pending, return_exceptions=True))
            count = len(results) - results.count("QueueFull")
            assert 6 <= count <= 8 and results == [*map(str, range(count)), *["QueueFull"] * (100 - count)]

    within(_LONG, work)


def test_other_calls_are_bounded(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, room=3) as batcher:
            engine.free.clear()
            pending = asyncio.ensure_future(batcher.ask(RANK, request("first")))
            await until(lambda: bool(engine.batches))
            others = [asyncio.ensure_future(batcher.between(lambda n=n: n)) for n in range(4)]
            with pytest.raises(QueueFull):
                await others[3]
            # Stored changes reach the engine nevertheless.
            change = asyncio.ensure_future(batcher.tell(lambda: "changed"))
            await asyncio.sleep(0.02)
            assert not change.done()
            engine.free.set()
            assert await asyncio.gather(*others[:3], change) == [0, 1, 2, "changed"]
            await pending

    within(_LONG, work)


def test_cancelled_caller_leaves_the_queue(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=4) as batcher:
            engine.free.clear()
            first = asyncio.ensure_future(batcher.ask(RANK, request("first")))
            await until(lambda: bool(engine.batches))
            going = [asyncio.ensure_future(batcher.ask(kind, request(kind.verb))) for kind in (RANK, RATE)]
            staying = asyncio.ensure_future(batcher.ask(RANK, request("staying")))
            await until(lambda: batcher.load.waiting == 3)
            for each in going:
                each.cancel()
            await asyncio.gather(*going, return_exceptions=True)
            assert all(each.cancelled() for each in going) and batcher.load.waiting == 1
            engine.free.set()
            assert outcomes(await asyncio.gather(first, staying)) == ["first", "staying"]
            assert batcher._queues == {}, "queues are not removed"

    within(_LONG, work)
    assert [ids for _, ids in engine.batches] == [["first"], ["staying"]]


def test_cancelled_caller_of_a_running_batch(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.05, most=4) as batcher:
            engine.free.clear()
            pending = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(3)]
            await until(lambda: bool(engine.batches))
            pending[1].cancel()
            engine.free.set()
            assert outcomes(await asyncio.gather(*pending, return_exceptions=True)) == ["0", "CancelledError", "2"]

    within(_LONG, work)


def test_late_questions_time_out(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=1, patience=1.0) as batcher:
            engine.free.clear()
            pending = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(3)]
            results = await asyncio.gather(*pending, return_exceptions=True)
            assert outcomes(results) == ["AnswerTimeout"] * 3
            assert all(isinstance(each, AnswerTimeout) and each.kind == "exhausted" for each in results)
            assert batcher.load.late == 3 and batcher.load.waiting == 0
            engine.free.set()
            batcher._patience = _LONG
            assert named(await batcher.ask(RANK, request("next"))) == "next"

    within(_LONG, work)
    # Questions that timed out in the queue never reached the engine.
    assert [ids for _, ids in engine.batches] == [["0"], ["next"]]


def test_hanging_engine_is_ended(engine: FakeEngine) -> None:
    async def work() -> None:
        def end() -> None:
            engine.fault = EngineLost("it was killed", kind="failed")
            engine.free.set()

        async with running(engine, window=0.0, patience=0.2, hangs=end) as batcher:
            engine.free.clear()
            with pytest.raises(AnswerTimeout):
                await batcher.ask(RANK, request("hangs"))
            await until(lambda: engine.fault is not None)
            engine.fault = None
            batcher._patience = _LONG
            # Questions that wait while the engine is lost are rejected with it.
            while True:
                try:
                    assert named(await batcher.ask(RANK, request("next"))) == "next"
                    break
                except EngineLost:
                    await asyncio.sleep(0.01)

    within(_LONG, work)


def test_lost_engine_fails_all_waiting_questions(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=2) as batcher:
            engine.free.clear()
            pending = [asyncio.ensure_future(batcher.ask(kind, request(n))) for n in range(10) for kind in (RANK, RATE)]
            await until(lambda: bool(engine.batches) and batcher.load.waiting == 18)
            engine.fault = EngineLost("killed", kind="failed")
            engine.free.set()
            assert outcomes(await asyncio.gather(*pending, return_exceptions=True)) == ["EngineLost"] * 20
            assert batcher.load.waiting == 0 and len(engine.batches) == 1
            engine.fault = None
            assert named(await batcher.ask(RANK, request("next"))) == "next"

    within(_LONG, work)


@pytest.mark.parametrize("fault", [DataError("invalid", kind="bad-value"), ValueError("a defect"), MemoryError()])
def test_failed_batch_affects_no_other(engine: FakeEngine, fault: Exception) -> None:
    async def work() -> None:
        async with running(engine, window=0.0) as batcher:
            engine.fault = fault
            with pytest.raises(LlmrecError) as caught:
                await batcher.ask(RANK, request("fails"))
            assert caught.value is fault or caught.value.kind == "defect"
            engine.fault = None
            assert named(await batcher.ask(RANK, request("next"))) == "next"

    within(_LONG, work)


def test_missing_answers_are_a_defect(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_for(lambda question, requests: [reply("1")] * (len(requests) - 1), window=0.0)
        batcher.start()
        with pytest.raises(LlmrecError) as caught:
            await batcher.ask(RANK, request("1"))
        assert caught.value.kind == "defect"
        await batcher.close()

    within(_LONG, work)


def test_close_answers_pending_and_rejects_new_questions(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=2) as batcher:
            engine.free.clear()
            pending = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(5)]
            other = asyncio.ensure_future(batcher.between(lambda: "other"))
            await until(lambda: bool(engine.batches))
            closing = asyncio.ensure_future(batcher.close())
            await asyncio.sleep(0.05)
            for late in (batcher.ask(RANK, request("late")), batcher.between(int), batcher.tell(int)):
                with pytest.raises(EngineLost):
                    await late
            assert not closing.done()
            engine.free.set()
            assert outcomes(await asyncio.gather(*pending)) == [str(n) for n in range(5)]
            assert await other == "other"
            await closing

    within(_LONG, work)


def test_close_does_not_wait_for_a_hanging_engine(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_for(engine.ask, window=0.0, most=1, patience=0.5)
        batcher.start()
        engine.free.clear()
        pending = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(3)]
        await until(lambda: bool(engine.batches))
        await batcher.close()
        results = outcomes(await asyncio.gather(*pending, return_exceptions=True))
        assert set(results) <= {"EngineLost", "AnswerTimeout"}
        # The thread must end before the loop of this test.
        engine.free.set()

    within(_LONG, work)


def test_close_before_start(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = batcher_for(engine.ask)
        await batcher.close()
        with pytest.raises(EngineLost):
            await batcher.ask(RANK, request("late"))
        assert not engine.batches

    within(_LONG, work)
