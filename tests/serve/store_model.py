"""Random calls of a service's store by two processes' worth of connections, compared with plain lists and sets."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any
from unittest import mock

from llmrec.errors import LlmrecError
from llmrec.serve import databases
from llmrec.serve import store as module
from llmrec.serve.store import ServiceStore, StoredEvent
from llmrec.types import Item

HOSTILE = (
    "'; DROP TABLE llmrec_events; --",
    "$1 ?1 %s {0} $$",
    "Zoë 映画 🎬 \u202e\u0301",
    '\\"\n\t[1]',
    "x" * 10_000,
    "".join(random.Random(0).choices("abcdefghij映画🎬", k=10_000)),
    " ",
    "",
)
_NAMES = (*HOSTILE, "ann", "bob", databases.ERASED_KEY)
_CALLS = ("add", "add", "add", "erase", "put", "remove", "look", "look")
_KILLS, _LOCKS, _OPENINGS = 0.02, 0.02, 0.05  # of the calls, where faults are asked for
_WAIT = 1.0  # seconds that a call waits for a lock which is never given up

# Stores events until it is killed, and prints the number of each call that has returned.
ADDS = """
import sys
from llmrec.serve.store import ServiceStore, StoredEvent
where, name = sys.argv[1:]
store = ServiceStore.open(where)
for n in range(10_000):
    store.add_events([StoredEvent(user_id=name, item_id=f"{n}-{j}", rating=None, timestamp=n) for j in range(3)])
    print(n, flush=True)
    if name != "killed" and n == 20:
        store.close()
        break
"""


def event(user: str, item: str = "i", at: float = 0.0, rating: float | None = None) -> StoredEvent:
    """Return an event."""
    return StoredEvent(user_id=user, item_id=item, rating=rating, timestamp=at)


def adding(where: str, name: str) -> subprocess.Popen[str]:
    """Start a process that adds events of a user; one that is named ``killed`` adds them until it is killed."""
    return subprocess.Popen([sys.executable, "-c", ADDS, where, name], stdout=subprocess.PIPE, text=True)


def killed(where: str, calls: int) -> int:
    """Kill a process that adds events after it has reported some calls, and return how many it had reported."""
    process = adding(where, "killed")
    assert process.stdout is not None
    reported = [int(process.stdout.readline()) for _ in range(calls)]
    process.send_signal(signal.SIGKILL)
    # Not communicate(): it reads the pipe itself, and would lose lines that readline() has buffered.
    reported += [int(line) for line in process.stdout.read().split()]
    process.stdout.close()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert reported == list(range(len(reported)))
    return len(reported)


@contextmanager
def locked(where: str) -> Iterator[None]:
    """Hold the events, as another program does that writes for a long time."""
    if "://" not in where:
        with closing(sqlite3.connect(where, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
        return
    from adbc_driver_postgresql import dbapi

    with dbapi.connect(where) as connection, connection.cursor() as cursor:
        cursor.execute("LOCK TABLE llmrec_events IN EXCLUSIVE MODE")
        yield
        connection.rollback()


class Model:
    """A store's two connections, and the lists and sets that say what must be in it."""

    def __init__(self, where: str, seed: int, stack: ExitStack) -> None:
        self._where, self._stack = where, stack
        self._rng = random.Random(seed)
        self._stores = [self._opened(), self._opened()]
        self._events: list[StoredEvent] = []
        self._erased, self._put, self._removed = set[str](), dict[str, Item](), set[str]()

    def _opened(self, **more: Any) -> ServiceStore:
        return self._stack.enter_context(closing(ServiceStore.open(self._where, **more)))

    def call(self, kind: str) -> None:
        """Make one call, and assert that it returns what it must."""
        rng = self._rng
        which, user = rng.randrange(2), rng.choice(_NAMES)
        store = self._stores[which]
        own = [each for each in self._events if each.user_id == user]
        match kind:
            case "add":
                jump = rng.choice([-3e8, 0.0, 3e8])
                with mock.patch.object(module.time, "time", lambda: 1.7e9 + jump):
                    new = [event(user, rng.choice(_NAMES), rng.choice([0.0, time.time(), 1e18])) for _ in range(3)]
                    assert store.add_events(new) == 3
                self._events += new
            case "erase":
                assert store.erase(user) == len(own)
                self._events = [each for each in self._events if each.user_id != user]
                self._erased.add(user)
            case "put":
                item = Item(item_id=user, title=rng.choice(_NAMES), fields={user: rng.choice(_NAMES)})
                assert store.put_items([item]) == 1
                self._put[user] = item
                self._removed.discard(user)
            case "remove":
                assert store.remove_items([user]) == (user not in self._removed)
                self._put.pop(user, None)
                self._removed.add(user)
            case "look":
                most = rng.choice([None, 0, 2])
                last = own if most is None else own[max(0, len(own) - most) :]
                assert store.events_of(user, most) == sorted(last, key=lambda each: each.timestamp)
                assert store.erased(user) is (user in self._erased)
            case "open":
                store.close()
                self._stores[which] = self._opened()
            case "lock":
                self._lock(user, own)
            case "kill":
                self._kill()

    def _lock(self, user: str, own: list[StoredEvent]) -> None:
        """While another program holds the events, they can be read, and adding is one error that stores nothing."""
        short = self._opened(wait=_WAIT)
        with locked(self._where):
            try:
                short.add_events([event(user)])
            except LlmrecError as error:
                assert error.kind == "busy", error
            else:
                raise AssertionError("events were stored under another program's lock")
            assert short.events_of(user) == sorted(own, key=lambda each: each.timestamp)

    def _kill(self) -> None:
        """What a killed process has reported is there; what it was adding is there as a whole, or not at all."""
        calls = killed(self._where, self._rng.randrange(1, 6))
        there = list(self._stores[0].all_events())
        assert there[: len(self._events)] == self._events
        new = there[len(self._events) :]
        assert len(new) in (3 * calls, 3 * calls + 3)
        assert new == [event("killed", f"{n}-{j}", n) for n in range(len(new) // 3) for j in range(3)]
        self._events = there

    def check(self) -> None:
        """Assert that both connections see all that must be there."""
        for store in self._stores:
            assert list(store.all_events()) == self._events
            assert store.item_changes() == (self._put, frozenset(self._removed))


def agree(where: str, seed: int, calls: int, *, faults: bool = False) -> Counter[str]:
    """Make random calls, also when the clock of the machine jumps, and assert that all of them agree with the model.

    Args:
        where: A store that is empty.
        seed: Of the calls.
        calls: How many.
        faults: Also close and open a store, lock it for other programs, and kill a process that adds events.

    Returns:
        How many calls of each kind there were.
    """
    made: Counter[str] = Counter()
    rng = random.Random(f"{seed} kinds")
    with ExitStack() as stack:
        model = Model(where, seed, stack)
        for _ in range(calls):
            kind, chance = rng.choice(_CALLS), rng.random() if faults else 1.0
            for fault, share in (("kill", _KILLS), ("lock", _LOCKS), ("open", _OPENINGS)):
                kind, chance = (fault if 0 <= chance < share else kind), chance - share
            model.call(kind)
            made[kind] += 1
        model.check()
    return made
