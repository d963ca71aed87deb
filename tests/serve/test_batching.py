"""The queue before an engine that is a function: who goes together, who is refused, and that nobody hangs."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from llmrec.answer.recommender import Answered, Question
from llmrec.data.requests import RankRequest
from llmrec.errors import DataError, LlmrecError
from llmrec.serve.batching import Batcher, Full, TooLate
from llmrec.serve.engine import EngineLost, Reply
from llmrec.types import Unparsed

RANK = Question(model=None, verb="rank")
RATE = Question(model=None, verb="rating")


def request(name: object) -> RankRequest:
    return RankRequest(id=str(name), candidates=())


def reply(name: str) -> Answered:
    return Answered(answer=Unparsed(request_id=name, reason="made up"))


def named(found: Reply) -> str:
    assert isinstance(found, Answered)
    return found.answer.request_id


@dataclass
class FakeEngine:
    """Answers with the ids that it was asked, after some seconds."""

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
    found = FakeEngine()
    yield found
    found.free.set()


@asynccontextmanager
async def running(engine: FakeEngine, **settings: Any) -> Any:
    batcher = Batcher(engine.ask, **{"window": 0.02, "patience": _LONG, **settings})
    batcher.start()
    try:
        yield batcher
    finally:
        engine.free.set()
        await batcher.close()


_LONG = 600.0
"""Seconds after which a test that hangs fails; no result depends on them."""


def within(seconds: float, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run a test's own loop; what hangs fails."""

    async def limited() -> Any:
        return await asyncio.wait_for(work(), seconds)

    return asyncio.run(limited())


def outcomes(found: Sequence[Any]) -> list[str]:
    return [named(each) if isinstance(each, Answered) else type(each).__name__ for each in found]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


# --------------------------------------------------------------------------- who goes together


def test_questions_go_together_and_each_gets_its_own_answer(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.1, most=8) as batcher:
            found = await asyncio.gather(*(batcher.ask(RANK, request(n)) for n in range(20)))
            assert [named(each) for each in found] == [str(n) for n in range(20)]
            assert batcher.load.batches == {8: 2, 4: 1}

    within(_LONG, work)
    assert [len(ids) for _, ids in engine.batches] == [8, 8, 4]
    assert [name for _, ids in engine.batches for name in ids] == [str(n) for n in range(20)]


def test_questions_of_different_kinds_do_not_go_together(engine: FakeEngine) -> None:
    kinds = [RANK, RATE, Question(model="other", verb="rank"), Question(model=None, verb="rank", depth=3)]

    async def work() -> list[Answered]:
        async with running(engine, window=0.1) as batcher:
            asked = [(kinds[n % 4], request(n)) for n in range(12)]
            return list(await asyncio.gather(*(batcher.ask(*each) for each in asked)))

    assert [named(each) for each in within(_LONG, work)] == [str(n) for n in range(12)]
    # The kind that has waited longest goes first.
    assert engine.batches == [(kind, [str(n) for n in range(12) if n % 4 == k]) for k, kind in enumerate(kinds)]


def test_equal_questions_of_two_clients_are_one_kind(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.1) as batcher:
            twice = [Question(model="a", verb="rank", depth=5) for _ in range(2)]
            await asyncio.gather(*(batcher.ask(each, request(n)) for n, each in enumerate(twice)))

    within(_LONG, work)
    assert [ids for _, ids in engine.batches] == [["0", "1"]]


@pytest.mark.parametrize("window", [0.0, 0.05])
def test_a_window_is_waited_and_none_is_none(engine: FakeEngine, window: float) -> None:
    async def work() -> float:
        async with running(engine, window=window) as batcher:
            begun = time.monotonic()
            assert named(await batcher.ask(RANK, request("only"))) == "only"
            return time.monotonic() - begun

    assert within(_LONG, work) >= window
    assert engine.batches == [(RANK, ["only"])]


def test_while_the_engine_works_others_come_together(engine: FakeEngine) -> None:
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


# --------------------------------------------------------------------------- too much


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=4, room=8) as batcher:
            engine.free.clear()
            asked = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(4)]
            await until(lambda: bool(engine.batches))
            asked += [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(4, 12)]
            await until(lambda: batcher.load.waiting == 8)
            with pytest.raises(Full) as caught:
                # Its first step ends it: it waits for nothing.
                batcher.ask(RATE, request("one too many")).send(None)
            assert caught.value.kind == "busy" and 1.0 <= caught.value.after <= 30.0
            engine.free.set()
            assert outcomes(await asyncio.gather(*asked)) == [str(n) for n in range(12)]
            assert batcher.load.refused == 1 and batcher.load.waiting == 0

    within(_LONG, work)


def test_who_was_let_in_is_not_harmed_by_five_times_too_much(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=4, room=16) as batcher:
            found: list[str] = []
            for lot in range(5):
                # A hundred come while the engine does nothing, which is five times what there is room for.
                engine.free.clear()
                asked = [asyncio.ensure_future(batcher.ask(RANK, request(100 * lot + n))) for n in range(100)]
                await until(lambda asked=asked: sum(each.done() for each in asked) >= 80)
                engine.free.set()
                found += outcomes(await asyncio.gather(*asked, return_exceptions=True))
            answered = [n for n, name in enumerate(found) if name == str(n)]
            assert set(found) - {"Full"} == {str(n) for n in answered}
            assert 5 * 16 <= len(answered) <= 5 * 20 and found.count("Full") == batcher.load.refused >= 400
            # Each that was let in was asked once, and in the order in which they came.
            assert [name for _, ids in engine.batches for name in ids] == [str(n) for n in answered]

    within(_LONG, work)


def test_a_queue_that_could_not_be_answered_in_time_refuses_before_it_is_full(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=1, room=10_000, patience=600.0) as batcher:
            # As it was measured lately: six of these are answered in time.
            batcher._seconds_each = 100.0
            engine.free.clear()
            asked = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(100)]
            await until(lambda: batcher.load.refused >= 90)
            engine.free.set()
            found = outcomes(await asyncio.gather(*asked, return_exceptions=True))
            count = len(found) - found.count("Full")
            assert 6 <= count <= 8 and found == [*map(str, range(count)), *["Full"] * (100 - count)]

    within(_LONG, work)


def test_other_calls_are_bounded_too(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, room=3) as batcher:
            engine.free.clear()
            asked = asyncio.ensure_future(batcher.ask(RANK, request("first")))
            await until(lambda: bool(engine.batches))
            others = [asyncio.ensure_future(batcher.between(lambda n=n: n)) for n in range(4)]
            with pytest.raises(Full):
                await others[3]
            # What is stored already reaches the engine all the same.
            told = asyncio.ensure_future(batcher.tell(lambda: "told"))
            await asyncio.sleep(0.02)
            assert not told.done()
            engine.free.set()
            assert await asyncio.gather(*others[:3], told) == [0, 1, 2, "told"]
            await asked

    within(_LONG, work)


# --------------------------------------------------------------------------- who leaves, what is late


def test_a_caller_who_goes_away_leaves_the_queue(engine: FakeEngine) -> None:
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

    within(_LONG, work)
    assert [ids for _, ids in engine.batches] == [["first"], ["staying"]]


def test_a_caller_who_goes_away_while_answered_harms_nobody(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.05, most=4) as batcher:
            engine.free.clear()
            asked = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(3)]
            await until(lambda: bool(engine.batches))
            asked[1].cancel()
            engine.free.set()
            assert outcomes(await asyncio.gather(*asked, return_exceptions=True)) == ["0", "CancelledError", "2"]

    within(_LONG, work)


def test_what_is_late_is_given_up_and_the_next_is_answered(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=1, patience=2.0) as batcher:
            engine.free.clear()
            asked = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(3)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert outcomes(found) == ["TooLate"] * 3
            assert all(isinstance(each, TooLate) and each.kind == "exhausted" for each in found)
            assert batcher.load.late == 3 and batcher.load.waiting == 0
            engine.free.set()
            batcher._patience = _LONG
            assert named(await batcher.ask(RANK, request("next"))) == "next"

    within(_LONG, work)
    # Those that nobody waited for any more were never asked.
    assert [ids for _, ids in engine.batches] == [["0"], ["next"]]


def test_an_engine_that_hangs_is_ended(engine: FakeEngine) -> None:
    async def work() -> None:
        def end() -> None:
            engine.fault = EngineLost("it was killed", kind="failed")
            engine.free.set()

        async with running(engine, window=0.0, patience=0.5, hangs=end) as batcher:
            engine.free.clear()
            with pytest.raises(TooLate):
                await batcher.ask(RANK, request("hangs"))
            await until(lambda: engine.fault is not None)
            engine.fault = None
            batcher._patience = _LONG
            # What waits when an engine is found lost is refused with it.
            while True:
                try:
                    assert named(await batcher.ask(RANK, request("next"))) == "next"
                    break
                except EngineLost:
                    await asyncio.sleep(0.01)

    within(_LONG, work)


# --------------------------------------------------------------------------- an engine that fails


def test_a_lost_engine_fails_all_that_wait_and_nothing_hangs(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=2) as batcher:
            engine.free.clear()
            asked = [asyncio.ensure_future(batcher.ask(kind, request(n))) for n in range(10) for kind in (RANK, RATE)]
            await until(lambda: bool(engine.batches) and batcher.load.waiting == 18)
            engine.fault = EngineLost("killed", kind="failed")
            engine.free.set()
            assert outcomes(await asyncio.gather(*asked, return_exceptions=True)) == ["EngineLost"] * 20
            assert batcher.load.waiting == 0 and len(engine.batches) == 1
            engine.fault = None
            assert named(await batcher.ask(RANK, request("next"))) == "next"

    within(_LONG, work)


@pytest.mark.parametrize(
    "fault", [DataError("made up", kind="bad-value"), ValueError("a defect"), AssertionError(), MemoryError()]
)
def test_a_batch_that_fails_takes_no_other_with_it(engine: FakeEngine, fault: Exception) -> None:
    async def work() -> None:
        async with running(engine, window=0.0) as batcher:
            engine.fault = fault
            with pytest.raises(LlmrecError) as caught:
                await batcher.ask(RANK, request("fails"))
            assert caught.value is fault or caught.value.kind == "defect"
            engine.fault = None
            assert named(await batcher.ask(RANK, request("next"))) == "next"

    within(_LONG, work)


def test_an_engine_that_answers_too_few_is_a_defect(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = Batcher(lambda question, requests: [reply("1")] * (len(requests) - 1), window=0.0, patience=10)
        batcher.start()
        with pytest.raises(LlmrecError) as caught:
            await batcher.ask(RANK, request("1"))
        assert caught.value.kind == "defect"
        await batcher.close()

    within(_LONG, work)


# --------------------------------------------------------------------------- the end


def test_what_was_asked_before_the_end_is_answered_and_what_comes_then_is_refused(engine: FakeEngine) -> None:
    async def work() -> None:
        async with running(engine, window=0.0, most=2) as batcher:
            engine.free.clear()
            asked = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(5)]
            other = asyncio.ensure_future(batcher.between(lambda: "other"))
            await until(lambda: bool(engine.batches))
            closing = asyncio.ensure_future(batcher.close())
            await asyncio.sleep(0.05)
            for late in (batcher.ask(RANK, request("late")), batcher.between(int), batcher.tell(int)):
                with pytest.raises(EngineLost):
                    await late
            assert not closing.done()
            engine.free.set()
            assert outcomes(await asyncio.gather(*asked)) == [str(n) for n in range(5)]
            assert await other == "other"
            await closing

    within(_LONG, work)


def test_an_engine_that_hangs_does_not_hold_up_the_end(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = Batcher(engine.ask, window=0.0, most=1, patience=0.5)
        batcher.start()
        engine.free.clear()
        asked = [asyncio.ensure_future(batcher.ask(RANK, request(n))) for n in range(3)]
        await until(lambda: bool(engine.batches))
        await batcher.close()
        found = outcomes(await asyncio.gather(*asked, return_exceptions=True))
        assert set(found) <= {"EngineLost", "TooLate"}
        # The thread may end now, so that the loop of this test can.
        engine.free.set()

    within(_LONG, work)


def test_the_end_of_a_queue_that_never_began(engine: FakeEngine) -> None:
    async def work() -> None:
        batcher = Batcher(engine.ask)
        await batcher.close()
        with pytest.raises(EngineLost):
            await batcher.ask(RANK, request("late"))
        assert not engine.batches

    within(_LONG, work)


# --------------------------------------------------------------------------- for a long time


@pytest.mark.slow
def test_nothing_grows_with_the_number_of_questions(engine: FakeEngine) -> None:
    engine.batches = _Forgets()
    sizes: list[int] = []

    async def work() -> None:
        async with running(engine, window=0.0, most=16, room=64, patience=600.0) as batcher:

            async def client(n: int) -> None:
                # Each fifth asks a kind of its own, and each seventh goes away.
                kind = Question(model=str(n), verb="rank") if n % 5 == 0 else RANK
                asked = asyncio.ensure_future(batcher.ask(kind, request(n)))
                if n % 7 == 0:
                    await asyncio.sleep(0)
                    asked.cancel()
                with suppress(asyncio.CancelledError):
                    await asked

            for lot in range(3):
                for start in range(0, 5000, 50):
                    await asyncio.gather(*(client(lot * 5000 + start + n) for n in range(50)))
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
            assert batcher._queues == {} and batcher._batch == [] and batcher.load.waiting == 0
            assert set(batcher.load.batches) <= set(range(1, 17))

    tracemalloc.start()
    try:
        within(120, work)
    finally:
        tracemalloc.stop()
    # The first lot fills what Python keeps; after 5,000 more, and 5,000 more, there is no more.
    assert all(later - earlier < 100_000 for earlier, later in pairwise(sizes)), sizes


class _Forgets(list[Any]):
    def append(self, each: Any) -> None:
        pass
