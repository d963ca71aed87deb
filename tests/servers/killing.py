"""Kills a client again and again while it asks a server, and counts what was lost, doubled or asked twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmrec.backends.cache import AnswerStore
from tests.servers.client import digests
from tests.servers.faulty import FaultyServer

_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What killing did.

    Attributes:
        last: What the last client, which was left alone, says of itself.
        under_way: At each kill, questions that were sent and not stored, and so are sent again.
        unstored: Those among them whose sound answer the server had sent.
        twice: Sound answers beyond one a question.
    """

    last: dict[str, Any]
    under_way: tuple[int, ...]
    unstored: tuple[int, ...]
    twice: int


def run(server: FaultyServer, store: Path, count: int, *, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run a client to its end and return what it says."""
    done = subprocess.run(
        _command(server, store, count, settings), capture_output=True, text=True, timeout=_SECONDS * 3
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kill(
    server: FaultyServer,
    store: Path,
    count: int,
    kills: int,
    *,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
) -> Outcome:
    """Kill clients after random numbers of answers, then let one finish."""
    rng, names = random.Random(seed), digests(count)
    under_way, unstored, stored = [], [], 0
    for left in range(kills, 0, -1):
        # Each takes a random part of its share of what is left.
        goal = rng.randrange(1, max(2, (count - stored) // (left + 1)))
        asked, answered = [server.asked[name] for name in names], [server.answered[name] for name in names]
        client = subprocess.Popen(_command(server, store, count, settings), stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + _SECONDS
        start = server.answered.total()
        while server.answered.total() < start + goal and time.monotonic() < deadline and client.poll() is None:
            time.sleep(0.002)
        assert client.poll() is None, f"the client ended with {client.returncode} before it was killed"
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        known, before = AnswerStore(store), stored
        stored = len(known)
        known.close()
        # No question that was stored before was asked by this client.
        under_way.append(_more(server.asked, names, asked) - (stored - before))
        unstored.append(_more(server.answered, names, answered) - (stored - before))
    last = run(server, store, count, settings=settings)
    twice = sum(server.answered[name] for name in names) - count
    return Outcome(last=last, under_way=tuple(under_way), unstored=tuple(unstored), twice=twice)


def _more(now: Mapping[str, int], names: Sequence[str], before: Sequence[int]) -> int:
    """How many of the questions have a higher count than before."""
    return sum(now[name] > known for name, known in zip(names, before, strict=True))


def _command(server: FaultyServer, store: Path, count: int, settings: dict[str, Any] | None) -> list[str]:
    words = [sys.executable, "-m", "tests.servers.client", server.url, str(store), str(count)]
    return [*words, "--settings", json.dumps(settings or {})]
